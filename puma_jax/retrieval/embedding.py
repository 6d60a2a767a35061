"""Embed a corpus into a folder of vectors, shard by shard, from where a killed run stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from puma_jax.data.items import Item
from puma_jax.data.mbeir import OnBadRecord
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError, DataError, EvaluationError, ItemError
from puma_jax.parallel import multihost
from puma_jax.retrieval.corpus import Corpus
from puma_jax.retrieval.vectors import Job, VectorDType, finish, has_shard, write_shard
from puma_jax.rows import RowShape

_SAMPLE = 1024
_PREPARED_AT_ONCE = 64


def embed(
    corpus: Corpus,
    embedder: Embedder,
    folder: Path,
    *,
    instruction: str | None = None,
    dtype: VectorDType = "float32",
    items_per_shard: int = 16384,
    on_bad_item: OnBadRecord = "error",
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> bool:
    """Embed what is not embedded yet, and return whether all shards of the folder are there now.

    A shard's bytes depend on its items alone: every one is packed by itself, into rows of a shape
    that the whole corpus was asked for. So it does not matter where a run was killed.

    Args:
        corpus: The items.
        embedder: The model.
        folder: Where the vectors go, see `retrieval.vectors`; made if it is missing.
        instruction: Put before the text of every item; for queries.
        dtype: Of the vectors on disk.
        items_per_shard: What is lost at most when a run is killed.
        on_bad_item: "error" stops at an item that cannot be read, "skip" notes it in its shard.
        part: The number of this process and how many there are, which take shards in turn.
        progress: Whether to show a bar.

    Raises:
        ConfigError: There is no such part, or shards would hold nothing.
        VectorsError: The folder holds other vectors, or a damaged shard.
        DataError, ItemError: An item cannot be read, and `on_bad_item` is "error".
        EvaluationError: A vector is not finite.
    """
    number, parts = part
    if not 0 <= number < parts:
        raise ConfigError(f"part {number}/{parts}: parts are 0/{parts} to {parts - 1}/{parts}")
    if items_per_shard < 1:
        raise ConfigError(f"items per shard are {items_per_shard}, expected at least 1")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = _Work(corpus, embedder, instruction, on_bad_item, pool)
        job = Job(
            model=embedder.fingerprint,
            corpus=corpus.fingerprint,
            items=corpus.items,
            instruction=instruction,
            dtype=dtype,
            width=embedder.width,
            items_per_shard=items_per_shard,
            shape={},
        ).claim(folder, lambda: asdict(work.shape()))
        ours = range(number, job.shards, parts)
        done = [shard for shard in ours if has_shard(folder, job, shard)]
        shape = RowShape(**job.shape)
        bar = tqdm(
            desc="embedding",
            unit="item",
            total=sum(len(job.rows(shard)) for shard in ours),
            initial=sum(len(job.rows(shard)) for shard in done),
            disable=not progress,
        )
        with bar:
            for shard in sorted({*ours} - {*done}):
                vectors, ids, skipped = work(job.rows(shard), shape, bar)
                write_shard(folder, job, shard, vectors, ids, skipped)
    multihost.once(lambda: None)  # the others' shards are there, too
    return finish(folder, job)


@dataclass(frozen=True)
class _Work:
    """Reads and embeds rows of a corpus."""

    corpus: Corpus
    embedder: Embedder
    instruction: str | None
    on_bad_item: OnBadRecord
    pool: ThreadPoolExecutor

    def shape(self) -> RowShape:
        """Return the shape of rows that fits the whole corpus, of which it reads a sample.

        An item that is larger than all of the sample is no error: `Embedder.encode` takes rows of
        another shape for it and for the rest of its shard.

        Raises:
            DataError: No item of the sample can be read.
        """
        rows = np.unique(np.linspace(0, self.corpus.items - 1, _SAMPLE).astype(int))
        sample = _Prepared(self, rows.tolist())
        items = list(sample)
        if not items:
            raise DataError(
                f"{self.corpus.source}: none of {len(rows):,} items looked at can be read; the "
                f"first of them: {sample.skipped[0][1]}"
            )
        return self.embedder.shape_for(items)

    def __call__(
        self, rows: range, shape: RowShape, bar: tqdm
    ) -> tuple[np.ndarray, list[str], list[str]]:
        """Return the vectors of some rows, their ids, and what could not be read."""
        # Long and short, with and without images: rows of one shape are then filled evenly.
        order = np.random.default_rng(0).permutation(rows)
        items = _Prepared(self, order.tolist(), bar)
        vectors = self.embedder.encode(items, shape=shape, progress=False)
        broken = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(broken):
            raise EvaluationError(
                f"{len(broken):,} of {len(vectors):,} vectors are not finite, the first that of "
                f'"{items.ids[broken[0]]}": look at the model\'s weights and dtype'
            )
        back = np.argsort(items.rows)
        skipped = [message for _, message in sorted(items.skipped)]
        return vectors[back], [items.ids[place] for place in back], skipped

    def prepare(self, row: int) -> tuple[str, Item] | DataError | ItemError:
        """Return an item's id and what the model reads; or the error, to be raised in its turn."""
        name = f"{self.corpus.source}: item {row}"
        try:
            name, item = self.corpus.read(row)
            return name, self.embedder.prepare(item, self.instruction)
        except DataError as error:
            return error
        except ItemError as error:
            return type(error)(f"{name}: {error}")


@dataclass
class _Prepared:
    """Items, prepared as they are read, and what was met on the way."""

    work: _Work
    wanted: list[int]
    bar: tqdm | None = None
    rows: list[int] = field(default_factory=list)
    """Those that were yielded."""
    ids: list[str] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """Other rows, and why."""

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self.wanted), _PREPARED_AT_ONCE):
            rows = self.wanted[start : start + _PREPARED_AT_ONCE]
            for row, found in zip(rows, self.work.pool.map(self.work.prepare, rows), strict=True):
                if self.bar is not None:
                    self.bar.update()
                if isinstance(found, Exception):
                    if self.work.on_bad_item == "error":
                        raise found
                    self.skipped.append((row, str(found)))
                    continue
                name, item = found
                self.rows.append(row)
                self.ids.append(name)
                yield item
