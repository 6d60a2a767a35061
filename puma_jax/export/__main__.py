"""Export a model, or vectors.

`python -m puma_jax.export stablehlo --model FOLDER --out exported`
`python -m puma_jax.export vectors --vectors FOLDER --format parquet --out exported`
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from puma_jax import Embedder, cli
from puma_jax.artifacts import atomic_folder, check_output
from puma_jax.config import DType
from puma_jax.errors import ConfigError
from puma_jax.evaluation.results import read_evaluation
from puma_jax.export import golden, sentence_transformers, stablehlo
from puma_jax.export.card import model_card, training_of
from puma_jax.export.vectors import Format, write_vectors
from puma_jax.model.encoder import parse_layers
from puma_jax.search.shards import Vectors

Kind = Literal["huggingface", "stablehlo", "sentence-transformers", "vectors"]


def main(
    kind: tyro.conf.Positional[Kind],
    model: str | None = None,
    out: Path = tyro.MISSING,
    vectors: Path | None = None,
    format: Format | None = None,  # noqa: A002
    rows_per_file: int = 250_000,
    keep_layers: str | None = None,
    dtype: DType | None = None,
    ret_token: str | None = None,
    adapter: str | None = None,
    license: str | None = None,  # noqa: A002
    results: Path | None = None,
) -> None:
    """Write a folder that other software can load; for a model, with a model card.

    Args:
        kind: Format: huggingface, for transformers and serving engines; stablehlo, a compiled
            function and a small loader that needs jax but not puma_jax; sentence-transformers; or
            vectors, which are not a model, for other stores and tools.
        model: Hugging Face folder or hub id of the model, such as a stage's in a training workdir.
        out: Folder to write; must not exist, or be empty.
        vectors: Folder of vectors that `python -m puma_jax.embed` wrote, for the kind vectors.
        format: Format of vectors: parquet and lance, with all that is known of the items; npy,
            fbin and u8bin, with ids beside them. Values of u8bin are rounded to 8 bits.
        rows_per_file: Vectors in a file of parquet or npy, and in a fragment of lance.
        keep_layers: Layers to keep: "12" for the first twelve, or indices such as "0-10,27". All
            of them by default.
        dtype: Dtype of the weights. The dtype of the model's files by default.
        ret_token: Token that ends every item, such as "<|video_pad|>"; for models without a spare
            row for [RET]. The one saved with the model, or [RET], by default.
        adapter: PEFT folder or hub id of an adapter on the model, merged when it is read. None by
            default.
        license: SPDX name for the card. By default the card refers to the base model's license.
        results: File results.json of `puma_jax.evaluate` for the card. By default the results of
            the training run whose workdir holds the model.
    """
    name = check_output(out).name
    if kind == "vectors":
        if vectors is None or format is None:
            raise ConfigError("vectors need --vectors, their folder, and --format")
        written = write_vectors(Vectors(vectors), out, format, rows_per_file=rows_per_file)
        print(f"{format}: {written['vectors']:,} vectors of {written['width']} values in {out}")
        return
    if model is None:
        raise ConfigError(f"{kind} needs --model, the folder or hub id of the model")
    layers = None if keep_layers is None else parse_layers(keep_layers)
    evaluation = None if results is None else read_evaluation(results)
    training = training_of(Path(model))
    embedder = Embedder.load(model, dtype=dtype, ret_token=ret_token, adapter=adapter)
    if layers is not None:
        embedder = embedder.keep_layers(layers)
    if (layers is not None or adapter is not None) and evaluation is None:
        training = None  # the run's results are not those of a model changed again
    write = {
        "huggingface": embedder.save,
        "stablehlo": lambda folder: stablehlo.write(embedder, folder),
        "sentence-transformers": lambda folder: sentence_transformers.write(embedder, folder),
    }
    with atomic_folder(out) as partial:
        write[kind](partial)
        card = model_card(
            embedder, kind, name, license_name=license, training=training, evaluation=evaluation
        )
        (partial / "README.md").write_text(card, "utf-8")
        golden.write(embedder, partial)
    print(f"{kind}: {embedder.config.decoder.layers} layers in {out}")


if __name__ == "__main__":
    cli.run(main)
