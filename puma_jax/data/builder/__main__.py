"""Build training data: `python -m puma_jax.data.builder --data.root DIR --model DIR --out DIR`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from puma_jax import cli
from puma_jax.data.builder.build import Settings, build
from puma_jax.data.prompts import Processor
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.model.hf import read_config


def main(
    model: Path, settings: tyro.conf.OmitArgPrefixes[Settings], ret_token: str | None = None
) -> None:
    """Build training data.

    Args:
        model: Folder of the model to train; only its tokenizer and config.json are read.
        settings: The data to build, and the folder to write.
        ret_token: Token that ends every item, as prompt.ret_token of the training run. The one
            saved with the model, or [RET], by default.
    """
    config, _ = read_config(model)
    if ret_token is not None:
        prompt = dataclasses.replace(config.prompt, ret_token=ret_token)
        config = dataclasses.replace(config, prompt=prompt)
    processor = Processor(load_tokenizer(model), config)
    summary = build(settings, processor)
    if summary.skipped.count:
        print(f"{summary.skipped.count:,} bad records were skipped, the first of them:")
        print("\n".join(f"  {message}" for message in summary.skipped.messages))
    if summary.longest:
        limit = processor.config.prompt.max_text_tokens
        print(
            f"{summary.longest:,} texts fill the limit of {limit} tokens at which text is truncated"
        )
    print(f"{summary.queries:,} queries of {', '.join(summary.sets)}")
    print(f"and {summary.candidates:,} candidates are in {settings.out}")


if __name__ == "__main__":
    cli.run(main)
