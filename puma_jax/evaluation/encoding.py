"""Embed queries and documents: in large batches, kept on disk if asked to, unreadable items named.

An item that cannot be read is an error with its id, or it is left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puma_jax.data.items import Item
from puma_jax.data.lines import BadRecords, OnBadRecord, reject, resolve_inside
from puma_jax.data.preparing import prepare
from puma_jax.embedder import Embedder, RawItem
from puma_jax.errors import DataError, EvaluationError, ItemError
from puma_jax.evaluation.vector_folder import GatheredRows, VectorFolder
from puma_jax.forward import check_vectors
from puma_jax.parallel import multihost
from puma_jax.progress import Progress
from puma_jax.typing import Bool, Float, Int, ndarray

Encode = Callable[[Sequence[RawItem]], ndarray]
"""Maps items to unit vectors, `[n, width]`, in the same order, such as `Embedder.encode`."""

# A call of an embedder may compile a program; a kill loses at most the items of one call.
_ITEMS_AT_ONCE = 1 << 14
_PLACEHOLDER: RawItem = {"text": "."}
"""Is embedded where an item is left out."""


@dataclass(frozen=True)
class ItemEncoder:
    """Encodes items with an embedder, and goes on where one cannot be read."""

    embedder: Embedder
    tokens_per_chunk: int | None = None
    """See `Embedder.encode`."""
    shared: bool = True
    """Whether each process encodes a part of the items on its own devices. False for an embedder
    whose mesh spans all processes, and for work of a single process."""

    def __call__(self, items: Sequence[RawItem]) -> Float[ndarray, "n width"]:
        """Return the vectors of items; a row of NaN for an item that cannot be read."""
        if not self.shared:
            return self._encode(items)
        return np.asarray(multihost.map_across_processes(self._encode)(items))

    def error(self, item: RawItem) -> ItemError | None:
        """Return why an item cannot be read; None if it can."""
        try:
            self.embedder.preprocess(item)
        except ItemError as error:
            return error
        return None

    def _encode(self, items: Sequence[RawItem]) -> Float[ndarray, "n width"]:
        out = np.full((len(items), self.embedder.embedding_dim), np.nan, np.float32)
        readable: list[int] = []
        vectors = self.embedder.encode(
            self._preprocessed(items, readable),
            tokens_per_chunk=self.tokens_per_chunk,
            progress=False,
        )
        out[readable] = vectors
        return out

    def _preprocessed(self, items: Sequence[RawItem], readable: list[int]) -> Iterator[Item]:
        """Yield the preprocessed items that can be read, and append their numbers to `readable`."""
        for number, item in enumerate(prepare(self._preparing, items)):
            if item is not None:
                readable.append(number)
                yield item

    async def _preparing(self, item: RawItem) -> Item | None:
        try:
            return await self.embedder.preparing(item)
        except ItemError:
            return None


@dataclass(frozen=True)
class Sources:
    """The items that vectors are asked of, by their rows."""

    kind: str
    """Name of an item in error messages, "query" or "document"."""
    count: int
    item: Callable[[int], RawItem]
    """Returns the item of a row."""
    name: Callable[[int], str]
    """Returns the id of a row."""
    located: Callable[[int, Exception], DataError]
    """Returns an error of a row with the name of the item and its file."""


@dataclass(frozen=True)
class Batches:
    """How items are embedded: by which function, with which progress bar, and where kept."""

    encode: Encode
    root: Path
    """Images that lie elsewhere, by a link, are not read."""
    bar: Progress
    folder: VectorFolder | None
    on_bad_record: OnBadRecord
    skipped: BadRecords

    def embed(
        self, sources: Sources, order: Int[ndarray, "n"]
    ) -> tuple[ndarray | GatheredRows, Bool[ndarray, "items"]]:
        """Return the vectors of items, and which items can be read.

        Args:
            sources: The items.
            order: Rows to embed, in this order; the vectors of other rows are undefined.

        Raises:
            DataError: An item cannot be read, and `on_bad_record` is "error".
            EvaluationError: There is not one finite vector for each item.
        """
        readable = np.ones(sources.count, bool)
        vectors: ndarray | GatheredRows | None = None
        for start in range(0, len(order), _ITEMS_AT_ONCE):
            # Shuffled, so that each call has the same mixture of lengths and images: the embedder
            # then fills rows of one shape and compiles once.
            rows = np.random.default_rng(0).permutation(order[start : start + _ITEMS_AT_ONCE])
            new, readable[rows] = self._batch(rows, sources)
            if vectors is None:
                shape = sources.count, new.shape[1]
                vectors = GatheredRows(*shape) if self.folder else np.empty(shape, np.float32)
            vectors[rows] = new
        assert vectors is not None  # a selection has queries and documents
        return vectors, readable

    def _batch(
        self, rows: Int[ndarray, "n"], sources: Sources
    ) -> tuple[Float[ndarray, "n width"], Bool[ndarray, "n"]]:
        """Return the vectors of some rows, and which of their items can be read."""
        items, inside = self._items(rows, sources)
        key = VectorFolder.key(items) if self.folder else ""
        vectors = self.folder.read(key, len(items)) if self.folder else None
        if vectors is not None:
            self.bar.update(len(items))
            return vectors, inside & self._check(vectors, rows, items, sources)
        vectors = self._encoded(items)
        readable = inside & self._check(vectors, rows, items, sources)
        return self.folder.write(key, vectors) if self.folder else vectors, readable

    def _items(
        self, rows: Int[ndarray, "n"], sources: Sources
    ) -> tuple[list[RawItem], Bool[ndarray, "n"]]:
        """Return the items of some rows, and which have no image outside of the benchmark."""
        items, inside = [sources.item(row) for row in rows.tolist()], np.ones(len(rows), bool)
        for place, item in enumerate(items):
            if "image" not in item:
                continue
            try:
                resolve_inside(self.root, item["image"].relative_to(self.root).as_posix())
            except DataError as error:
                self._reject(sources, rows[place], error)
                items[place], inside[place] = _PLACEHOLDER, False
        return items, inside

    def _encoded(self, items: list[RawItem]) -> Float[ndarray, "n width"]:
        """Return the vectors of items; the bar goes on with them."""
        tracked = _TrackedItems(items, self.bar)
        new = np.asarray(self.encode(tracked), np.float32)
        self.bar.update(len(items) - tracked.seen)  # items that encode did not iterate over
        if new.ndim != 2 or len(new) != len(items):
            raise EvaluationError(
                f"encode returned an array of shape {new.shape} for {len(items)} items, "
                "expected one vector for each"
            )
        return new

    def _check(
        self,
        vectors: Float[ndarray, "n width"],
        rows: Int[ndarray, "n"],
        items: list[RawItem],
        sources: Sources,
    ) -> Bool[ndarray, "n"]:
        """Return which items can be read, and check the vectors of these."""
        readable = np.ones(len(items), bool)
        if isinstance(self.encode, ItemEncoder):
            for place in np.flatnonzero(np.isnan(vectors).all(1)).tolist():
                error = self.encode.error(items[place])
                if error is not None:
                    self._reject(sources, rows[place], error)
                    readable[place] = False
        ids = [sources.name(row) for row in rows[readable].tolist()]
        check_vectors(vectors[readable], lambda number: f'{sources.kind} "{ids[number]}"')
        return readable

    def _reject(self, sources: Sources, row: np.int64, error: Exception) -> None:
        """Raise the error of an item with its name and file, or count it."""
        reject(sources.located(int(row), error), self.on_bad_record, self.skipped)


class _TrackedItems(list[RawItem]):
    """Items that advance a progress bar as they are iterated over."""

    def __init__(self, items: list[RawItem], bar: Progress):
        super().__init__(items)
        self.bar = bar
        self.seen = 0

    def __iter__(self) -> Iterator[RawItem]:
        for item in super().__iter__():
            yield item
            if self.seen < len(self):  # not in a second iteration
                self.seen += 1
                self.bar.update()
