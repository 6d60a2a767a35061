"""Verify that every engine gives the same vectors as the model.

`python -m puma_jax.verify --model FOLDER --export EXPORTED --url http://127.0.0.1:8000`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from puma_jax import Embedder, cli
from puma_jax.artifacts import write_text
from puma_jax.config import DType
from puma_jax.errors import ConfigError
from puma_jax.export.agreement import Agreement, Check, kind_of, table
from puma_jax.export.card import with_verification
from puma_jax.model import hf
from puma_jax.model.encoder import parse_layers


def main(
    model: str,
    exports: Annotated[tuple[Path, ...], tyro.conf.arg(name="export")] = (),
    url: str | None = None,
    api_key_file: Path | None = None,
    keep_layers: str | None = None,
    ret_token: str | None = None,
    update_cards: bool = False,
) -> None:
    """Compare vectors of a fixed set of items; exit with 1 if an engine lies beyond its tolerance.

    The reference is puma_jax in float32. Engines are puma_jax with each item alone and in
    bfloat16, transformers, each export by the software it is made for, and a service. An engine
    that is not installed has a row that says so.

    Args:
        model: Hugging Face folder or hub id of the model.
        exports: Folders that `puma_jax.export` wrote of this model.
        url: Address of a running service of this model, such as http://127.0.0.1:8000.
        api_key_file: File whose first line is the key of the service.
        keep_layers: Layers that the exports and the service keep: "12" for the first twelve, or
            indices such as "0-10,27". All of them by default.
        ret_token: Token that ends every item, such as "<|video_pad|>"; for models without a spare
            row for [RET]. The one saved with the model, or [RET], by default.
        update_cards: Whether to write the table into the model cards of the exports.
    """
    layers = None if keep_layers is None else parse_layers(keep_layers)
    for folder in exports:
        kind_of(folder)
    key = None if api_key_file is None else _first_line(api_key_file)
    checkpoint = hf.open_checkpoint(model)

    def load(dtype: DType) -> Embedder:
        embedder = Embedder.load(model, dtype=dtype, ret_token=ret_token)
        return embedder if layers is None else embedder.keep_layers(layers)

    agreement = Agreement(load("float32"), checkpoint.dtype)
    checks = [*agreement.checks_of_puma_jax(load("bfloat16"))]
    if layers is None:
        checks.append(agreement.check_transformers(checkpoint.folder, "float32"))
    for folder in exports:
        checks += agreement.checks_of_export(folder)
    if url is not None:
        checks.append(agreement.check_service(url, key))
    print(f"Largest differences from puma_jax in float32, {len(agreement.items)} golden items:\n")
    print(table(checks), flush=True)
    if update_cards:
        _update_cards(exports, checks)
    if any(check.bad for check in checks):
        sys.exit(1)


def _first_line(path: Path) -> str:
    """Return the key in a file."""
    try:
        return path.read_text("utf-8").split("\n", 1)[0].strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from None


def _update_cards(exports: tuple[Path, ...], checks: list[Check]) -> None:
    """Write the table of all checks into the card of each export."""
    for folder in exports:
        path = folder / "README.md"
        card = path.read_text("utf-8") if path.is_file() else ""
        write_text(path, with_verification(card, table(checks)))


if __name__ == "__main__":
    cli.run(main)
