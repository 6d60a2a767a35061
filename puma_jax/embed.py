"""Embed a corpus into numbered shards of vectors and ids.

`python -m puma_jax.embed --model FOLDER --items photos/ --out vectors`
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import jax
import tyro

from puma_jax import cli
from puma_jax.config import DType
from puma_jax.data.lines import OnBadRecord
from puma_jax.errors import ConfigError
from puma_jax.model.attention import describe
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.multihost import DistributedConfig
from puma_jax.search.corpus import Columns, open_corpus
from puma_jax.search.embedding import embed
from puma_jax.search.model_source import ModelSource
from puma_jax.search.spec import VectorDType

_ALL_DEVICES = MeshConfig()
_COLUMNS = Columns()
_ALONE = DistributedConfig()


def main(
    model: str,
    items: Path,
    out: Path,
    images: Path | None = None,
    instruction: str | None = None,
    vectors_dtype: VectorDType = "float32",
    dimensions: int | None = None,
    items_per_shard: int = 16384,
    on_bad_record: OnBadRecord = "error",
    dtype: DType | None = None,
    ret_token: str | None = None,
    adapter: str | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
    part: str | None = None,
    columns: Annotated[Columns, tyro.conf.arg(name="")] = _COLUMNS,
    distributed: DistributedConfig = _ALONE,
) -> None:
    """Embed a corpus over all local devices. Rerun the same command to resume after a stop.

    Args:
        model: Hugging Face folder or hub id of the model.
        items: A folder of images; JSON lines {"id", "text", "image"}; a table that ends in .csv,
            .tsv or .parquet; a dataset of Hugging Face, as a folder or as hf:NAME:SPLIT; or a pool
            in M-BEIR layout.
        out: Folder to write the vectors to. A rerun embeds only what is new or has changed.
        images: Folder that holds the images of a file: relative paths start from it, and a path
            that leads out of it is an error. By default the benchmark's root for a pool, and the
            file's own folder for JSON lines.
        instruction: Instruction to put before the text of every item, for queries. None by default.
        vectors_dtype: Dtype of the vectors on disk; ubinary is one bit for each value.
        dimensions: Values to keep of each vector, the first ones. All by default.
        items_per_shard: Items in a shard; a stop loses the work on one shard at most.
        on_bad_record: "error" stops at an item that cannot be read, "skip" notes it in the shard's
            skipped.txt and continues.
        dtype: Dtype of weights and activations. The dtype of the model's files by default.
        ret_token: Token that ends every item, such as "<|video_pad|>"; for models without a spare
            row for [RET]. The one saved with the model, or [RET], by default.
        adapter: PEFT folder or hub id of an adapter on the model, merged when it is read. None by
            default.
        mesh: How the local devices share the work.
        part: Share of the shards to embed: "2/8" takes every eighth shard from number 2 on, for
            several machines that write one folder. The share of this process by default.
        columns: Names of the columns that make up an item; all others are kept as fields.
        distributed: How processes that share the work find each other.
    """
    multihost.initialize(distributed)
    corpus = open_corpus(items, images, columns)
    for note in corpus.notes():
        print(note, flush=True)
    source = ModelSource.of(model, dtype, ret_token, adapter)
    embedder = source.load(make_mesh(mesh, jax.local_devices()))
    print(describe(embedder.compute), flush=True)
    number, parts = parse_part(part)
    done = embed(
        corpus,
        embedder,
        out,
        instruction=instruction,
        vectors_dtype=vectors_dtype,
        dimensions=dimensions,
        items_per_shard=items_per_shard,
        on_bad_record=on_bad_record,
        part=(number, parts),
        source=source,
    )
    print(f"Part {number}/{parts}: {done}" if parts > 1 else done)
    if done.complete:
        print(f"The vectors are complete; {out / 'manifest.json'} lists their shards")
    else:
        print(f"This part is embedded; shards of other parts are still missing in {out}")


def parse_part(text: str | None) -> tuple[int, int]:
    """Return the number of a part, from 0, and the number of parts; None gives this process's.

    >>> parse_part("2/8")
    (2, 8)

    Raises:
        ConfigError: The text is not of the form NUMBER/COUNT.
    """
    if text is None:
        return jax.process_index(), jax.process_count()
    found = re.fullmatch("([0-9]+)/([0-9]+)", text)
    if not found:
        raise ConfigError(f'part "{text}" is not a number and a count such as 0/4')
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    cli.run(main)
