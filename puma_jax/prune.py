"""Prune a model to some of its decoder layers.

`python -m puma_jax.prune --model Qwen/Qwen2-VL-2B-Instruct --keep-layers 12 --out pruned`
"""

from __future__ import annotations

from pathlib import Path

from puma_jax import Embedder, cli
from puma_jax.artifacts import check_output
from puma_jax.model.encoder import parse_layers


def main(
    model: str,
    keep_layers: str,
    out: Path,
    ret_token: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write a model with some of the decoder layers of another.

    Args:
        model: Hugging Face folder or hub id of the model.
        keep_layers: Layers to keep: "12" for the first twelve, or indices such as "0-10,27".
        out: Folder to write; must not exist, or be empty.
        ret_token: Token that ends every item, such as "<|video_pad|>"; for models without a spare
            row for [RET]. The one saved with the model, or [RET], by default.
        adapter: PEFT folder or hub id of an adapter on the model, merged when it is read. None by
            default.
    """
    check_output(out)
    layers = parse_layers(keep_layers)
    embedder = Embedder.load(model, dtype=None, ret_token=ret_token, adapter=adapter)
    embedder = embedder.keep_layers(layers)
    print(
        f"Reading {embedder.config.decoder.layers} layers of {model}, writing {out} ...", flush=True
    )
    embedder.save(out)
    kept = ", ".join(map(str, embedder.config.kept_layers))
    print(f"Kept layers {kept}. The model is in {out}")


if __name__ == "__main__":
    cli.run(main)
