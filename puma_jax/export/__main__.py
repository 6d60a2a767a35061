"""Export a model.

`python -m puma_jax.export stablehlo --model FOLDER --out exported`
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import tyro

from puma_jax import Embedder, cli
from puma_jax.config import DType
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.evaluation.report import Evaluation
from puma_jax.export import sentence_transformers, stablehlo
from puma_jax.export.card import model_card, training_of
from puma_jax.model.encoder import parse_layers

Kind = Literal["huggingface", "stablehlo", "sentence-transformers"]


def main(
    kind: tyro.conf.Positional[Kind],
    model: str,
    out: Path,
    keep_layers: str | None = None,
    dtype: DType | None = None,
    license: str | None = None,  # noqa: A002
    results: Path | None = None,
) -> None:
    """Write a folder that other software can load, with a model card.

    Args:
        kind: Format: huggingface, for transformers and serving engines; stablehlo, a compiled
            function and a small loader that needs jax but not puma_jax; or sentence-transformers.
        model: Hugging Face folder or hub id of the model, such as a stage's in a training workdir.
        out: Folder to write; must not exist, or be empty.
        keep_layers: Layers to keep: "12" for the first twelve, or indices such as "0-10,27". All
            of them by default.
        dtype: Dtype of the weights. The dtype of the model's files by default.
        license: SPDX name for the card. By default the card refers to the base model's license.
        results: File results.json of `puma_jax.evaluate` for the card. By default the results of
            the training run whose workdir holds the model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists: choose another folder, or remove it")
    evaluation = None if results is None else Evaluation.read(results)
    training = training_of(Path(model))
    embedder = Embedder.load(model, dtype=dtype)
    if keep_layers is not None:
        embedder = embedder.keep_layers(parse_layers(keep_layers))
    if keep_layers is not None and evaluation is None:
        training = None  # the run's results are not those of a model pruned again
    unfinished = out.with_name(f"{out.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write = {
            "huggingface": embedder.save,
            "stablehlo": lambda folder: stablehlo.write(embedder, folder),
            "sentence-transformers": lambda folder: sentence_transformers.write(embedder, folder),
        }
        write[kind](unfinished)
        card = model_card(
            embedder, kind, out.name, license_name=license, training=training, evaluation=evaluation
        )
        (unfinished / "README.md").write_text(card, "utf-8")
        unfinished.replace(out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{kind}: {embedder.config.decoder.layers} layers in {out}")


if __name__ == "__main__":
    cli.run(main)
