"""Embed a corpus: items in, numbered shards of vectors and ids out.

`python -m puma_jax.embed --model FOLDER --items photos/ --out vectors`
"""

from __future__ import annotations

import re
from pathlib import Path

import jax

from puma_jax import Embedder, cli
from puma_jax.config import DType
from puma_jax.data.mbeir import OnBadRecord
from puma_jax.errors import ConfigError
from puma_jax.model.attention import describe
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.multihost import DistributedConfig
from puma_jax.retrieval.corpus import open_corpus
from puma_jax.retrieval.embedding import embed
from puma_jax.retrieval.vectors import VectorDType

_ALL_DEVICES = MeshConfig()
_ALONE = DistributedConfig()


def main(
    model: str,
    items: Path,
    out: Path,
    images: Path | None = None,
    instruction: str | None = None,
    dtype: VectorDType = "float32",
    items_per_shard: int = 16384,
    on_bad_item: OnBadRecord = "error",
    weights: DType | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
    part: str | None = None,
    distributed: DistributedConfig = _ALONE,
) -> None:
    """Embed a corpus over all local devices. Run it again after a stop, and it goes on.

    Args:
        model: A Hugging Face folder or hub id.
        items: A pool in M-BEIR layout, JSON lines {"id", "text", "image"}, or a folder of images.
        out: Folder of the vectors.
        images: Folder that image paths in a file start from; by default the benchmark's root, or
            the file's own folder.
        instruction: What is looked for, put before the text of every item; for queries.
        dtype: Of the vectors on disk.
        items_per_shard: Vectors in a shard, which is what a stop loses at most.
        on_bad_item: Stop at an item that cannot be read, or note it in skipped.txt and go on.
        weights: Dtype of weights and activations; that of the model's files by default.
        mesh: How the local devices share the work.
        part: "2/8" embeds every eighth shard from number 2 on: for several machines with one
            folder. By default this process's share, if there are others.
        distributed: How processes that share the work find each other.
    """
    multihost.initialize(distributed)
    corpus = open_corpus(items, images)
    embedder = Embedder.load(model, dtype=weights, mesh=make_mesh(mesh, jax.local_devices()))
    print(describe(embedder.compute), flush=True)
    complete = embed(
        corpus,
        embedder,
        out,
        instruction=instruction,
        dtype=dtype,
        items_per_shard=items_per_shard,
        on_bad_item=on_bad_item,
        part=parse_part(part),
    )
    if complete:
        print(f"{corpus.items:,} items are embedded, {out / 'manifest.json'} lists the shards")
    else:
        print(f"This part is embedded; shards of other parts are still missing in {out}")


def parse_part(text: str | None) -> tuple[int, int]:
    """Return the number of a part and how many there are.

    >>> parse_part("2/8")
    (2, 8)

    Raises:
        ConfigError: The text is something else.
    """
    if text is None:
        return jax.process_index(), jax.process_count()
    found = re.fullmatch("([0-9]+)/([0-9]+)", text)
    if not found:
        raise ConfigError(f'part "{text}" is not a number and a count such as 0/4')
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    cli.run(main)
