"""Cut a model to some of its layers.

`python -m puma_jax.prune --model Qwen/Qwen2-VL-2B-Instruct --keep-layers 12 --out pruned`
"""

from __future__ import annotations

from pathlib import Path

from puma_jax import Embedder, cli
from puma_jax.errors import LayerSelectionError


def main(model: str, keep_layers: str, out: Path) -> None:
    """Write a model that has only some of the decoder layers of another.

    Args:
        model: A Hugging Face folder or hub id.
        keep_layers: A number of first layers ("12"), or indices and ranges ("0-10,27").
        out: Folder to write; must not exist.
    """
    embedder = Embedder.load(model, dtype=None).keep_layers(parse_layers(keep_layers))
    print(
        f"Reading {embedder.config.decoder.layers} layers of {model}, writing {out} ...", flush=True
    )
    embedder.save(out)
    kept = ", ".join(map(str, embedder.config.kept_layers))
    print(f"Kept layers {kept}. The model is in {out}")


def parse_layers(text: str) -> int | list[int]:
    """Return what a --keep-layers flag means: a count or a list of indices.

    >>> parse_layers("12")
    12
    >>> parse_layers("0-3,27")
    [0, 1, 2, 3, 27]

    Raises:
        LayerSelectionError: The text is neither.
    """
    try:
        if "," not in text and "-" not in text:
            return int(text)
        layers: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            if part.strip():
                layers += range(int(first), int(last or first) + 1)
        return layers
    except ValueError:
        raise LayerSelectionError(
            f'keep_layers "{text}" is neither a number nor indices such as 0-10,27'
        ) from None


if __name__ == "__main__":
    cli.run(main)
