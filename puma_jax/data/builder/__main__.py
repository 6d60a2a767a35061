"""Build training data: `python -m puma_jax.data.builder --data.root DIR --model DIR --out DIR`."""

from __future__ import annotations

from pathlib import Path

import tyro

from puma_jax import cli
from puma_jax.data.builder.build import Settings, build
from puma_jax.data.prompts import Processor, load_tokenizer
from puma_jax.model.hf import read_config


def main(model: Path, settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """Build training data.

    Args:
        model: Folder of the model to train; only its tokenizer and config.json are read.
        settings: The data to build, and the folder to write.
    """
    processor = Processor(load_tokenizer(model), read_config(model)[0])
    summary = build(settings, processor)
    for note in summary.notes():
        print(note)
    if not summary.written:
        print("Nothing to do: it is already built.")
    elif summary.written < summary.shards:
        print(f"{summary.written:,} of {summary.shards:,} shards were written, the others are kept")
    print(f"{summary.queries:,} queries of {', '.join(summary.sets)}")
    print(f"and {summary.candidates:,} candidates are in {settings.out}")


if __name__ == "__main__":
    cli.run(main)
