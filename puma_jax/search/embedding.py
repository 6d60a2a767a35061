"""Embed a corpus into a folder of vectors, shard by shard; a rerun resumes after a kill."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from puma_jax.data.items import Item
from puma_jax.data.mbeir import OnBadRecord
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError, DataError, EvaluationError, ItemError
from puma_jax.parallel import multihost
from puma_jax.progress import Progress
from puma_jax.rows import PackedShape
from puma_jax.search.corpus import Corpus
from puma_jax.search.shards import EmbeddingSpec, VectorDType, finish, has_shard, write_shard
from puma_jax.typing import Float, ndarray

_SAMPLE = 1024
_PREPROCESSED_AT_ONCE = 64


def embed(
    corpus: Corpus,
    embedder: Embedder,
    folder: Path,
    *,
    instruction: str | None = None,
    vectors_dtype: VectorDType = "float32",
    items_per_shard: int = 16384,
    on_bad_record: OnBadRecord = "error",
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> bool:
    """Embed the missing shards of a corpus, and return whether all shards are there now.

    The bytes of a shard depend on its items alone: each shard is packed by itself, into rows of
    one shape for the whole corpus. They do not depend on where a run was killed.

    Args:
        corpus: Items to embed.
        embedder: The model.
        folder: Folder of the vectors, see `search.shards`; created if it is missing.
        instruction: Instruction before the text of every item, for queries; None for documents.
        vectors_dtype: Dtype of the vectors on disk.
        items_per_shard: Items in a shard, which is the most that a kill loses.
        on_bad_record: "error" stops at an item that cannot be read, "skip" notes it in its shard.
        part: Number of this process and number of processes, which take shards in turn.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: `part` is out of range, or `items_per_shard` is below 1.
        VectorsError: The folder holds vectors of another run, or a damaged shard.
        DataError, ItemError: An item cannot be read, and `on_bad_record` is "error".
        EvaluationError: A vector is not finite.
    """
    number, parts = part
    if not 0 <= number < parts:
        raise ConfigError(f"part {number}/{parts}: parts are 0/{parts} to {parts - 1}/{parts}")
    if items_per_shard < 1:
        raise ConfigError(f"items per shard are {items_per_shard}, expected at least 1")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = _Work(corpus, embedder, instruction, on_bad_record, pool)
        spec = EmbeddingSpec(
            model=embedder.fingerprint,
            corpus=corpus.fingerprint,
            items=corpus.items,
            instruction=instruction,
            dtype=vectors_dtype,
            width=embedder.embedding_dim,
            items_per_shard=items_per_shard,
            shape={},
        ).claim(folder, lambda: asdict(work.shape()))
        ours = range(number, spec.shards, parts)
        done = [shard for shard in ours if has_shard(folder, spec, shard)]
        shape = PackedShape(**spec.shape)
        bar = Progress(
            desc="embedding",
            unit="item",
            total=sum(len(spec.rows(shard)) for shard in ours),
            initial=sum(len(spec.rows(shard)) for shard in done),
            disable=not progress,
        )
        with bar:
            for shard in sorted({*ours} - {*done}):
                vectors, ids, skipped = work(spec.rows(shard), shape, bar)
                write_shard(folder, spec, shard, vectors, ids, skipped)
    multihost.on_process_zero(lambda: None)  # wait for the shards of other processes
    return finish(folder, spec)


def check_finite(vectors: Float[ndarray, "n width"], ids: Sequence[str], kind: str) -> None:
    """Check that vectors hold finite numbers only.

    Args:
        vectors: One vector for each item.
        ids: Ids of the items.
        kind: What an item is called in the error message.

    Raises:
        EvaluationError: A vector has a value that is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise EvaluationError(
            f"{len(bad):,} of {len(vectors):,} vectors are not finite, the first that of "
            f'{kind} "{ids[bad[0]]}": look at the model\'s weights and dtype'
        )


@dataclass(frozen=True)
class _Work:
    """Reads and embeds items of a corpus."""

    corpus: Corpus
    embedder: Embedder
    instruction: str | None
    on_bad_record: OnBadRecord
    pool: ThreadPoolExecutor

    def shape(self) -> PackedShape:
        """Return a shape of packed rows for the whole corpus, estimated from a sample of items.

        An item that is larger than all of the sample is no error: `Embedder.encode` chooses another
        shape for it and for the rest of its shard.

        Raises:
            DataError: No item of the sample can be read.
        """
        rows = np.unique(np.linspace(0, self.corpus.items - 1, _SAMPLE).astype(int))
        sample = _Preprocessed(self, rows.tolist())
        items = list(sample)
        if not items:
            raise DataError(
                f"{self.corpus.source}: none of {len(rows):,} items looked at can be read; the "
                f"first of them: {sample.skipped[0][1]}"
            )
        return self.embedder.shape_for(items)

    def __call__(
        self, rows: range, shape: PackedShape, bar: Progress
    ) -> tuple[np.ndarray, list[str], list[str]]:
        """Return the vectors of some items, their ids, and a line for each item skipped."""
        # Shuffled, so that long items, short ones and images fill rows of one shape evenly.
        order = np.random.default_rng(0).permutation(rows)
        items = _Preprocessed(self, order.tolist(), bar)
        vectors = self.embedder.encode(items, shape=shape, progress=False)
        check_finite(vectors, items.ids, "item")
        back = np.argsort(items.rows)
        skipped = [message for _, message in sorted(items.skipped)]
        return vectors[back], [items.ids[place] for place in back], skipped

    def preprocess(self, row: int) -> tuple[str, Item] | DataError | ItemError:
        """Return the id and the preprocessed item of a row, or the error that prevents it."""
        name = f"{self.corpus.source}: item {row}"
        try:
            name, item = self.corpus.read(row)
            return name, self.embedder.preprocess(item, self.instruction)
        except DataError as error:
            return error
        except ItemError as error:
            return type(error)(f"{name}: {error}")


@dataclass
class _Preprocessed:
    """Items preprocessed while they are iterated over, with their ids and the rows skipped."""

    work: _Work
    wanted: list[int]
    bar: Progress | None = None
    rows: list[int] = field(default_factory=list)
    """Rows that were yielded."""
    ids: list[str] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """Rows that were skipped, each with its error."""

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self.wanted), _PREPROCESSED_AT_ONCE):
            rows = self.wanted[start : start + _PREPROCESSED_AT_ONCE]
            for row, found in zip(
                rows, self.work.pool.map(self.work.preprocess, rows), strict=True
            ):
                if self.bar is not None:
                    self.bar.update()
                if isinstance(found, Exception):
                    if self.work.on_bad_record == "error":
                        raise found
                    self.skipped.append((row, str(found)))
                    continue
                name, item = found
                self.rows.append(row)
                self.ids.append(name)
                yield item
