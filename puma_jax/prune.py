"""Prune a model to some of its decoder layers.

`python -m puma_jax.prune --model Qwen/Qwen2-VL-2B-Instruct --keep-layers 12 --out pruned`
"""

from __future__ import annotations

from pathlib import Path

from puma_jax import Embedder, cli
from puma_jax.model.encoder import parse_layers


def main(model: str, keep_layers: str, out: Path) -> None:
    """Write a model with some of the decoder layers of another.

    Args:
        model: Hugging Face folder or hub id of the model.
        keep_layers: Layers to keep: "12" for the first twelve, or indices such as "0-10,27".
        out: Folder to write; must not exist.
    """
    embedder = Embedder.load(model, dtype=None).keep_layers(parse_layers(keep_layers))
    print(
        f"Reading {embedder.config.decoder.layers} layers of {model}, writing {out} ...", flush=True
    )
    embedder.save(out)
    kept = ", ".join(map(str, embedder.config.kept_layers))
    print(f"Kept layers {kept}. The model is in {out}")


if __name__ == "__main__":
    cli.run(main)
