"""Exact search over a folder of vectors, without a database."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from puma_jax.data.mbeir import MODALITIES, Modality
from puma_jax.errors import SearchError
from puma_jax.search.filters import parse_filter
from puma_jax.search.index import Document, Hit
from puma_jax.search.records import ItemRecord
from puma_jax.search.shards import Vectors
from puma_jax.search.topk import top_k
from puma_jax.typing import Bool, Float, Int, ndarray

_HELD_BYTES = 4 * 2**30
"""Vectors that need no more than this in float32 are held in memory, others are read each time."""
_FILTERS_HELD = 64
_ROWS_AT_ONCE = 16384


@dataclass(eq=False)
class _Call:
    """A call of `ExactIndex.search`, and what was found: scores and rows of each query."""

    vectors: Float[ndarray, "queries width"]
    k: int
    among: tuple[Modality | None, str | None]
    found: list[list[tuple[float, int]]] | None = None


class ExactIndex:
    """The documents of a folder of vectors; every query is compared with all that match.

    Implements `search.index.Index`. Memory holds the documents, and the vectors if they are small.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Read the documents of a folder.

        Args:
            folder: Folder that `python -m puma_jax.embed` wrote.

        Raises:
            VectorsError: The folder is not complete, or damaged.
            SearchError: Two documents have one id.
        """
        self._vectors = Vectors(folder)
        spec = self._vectors.spec
        self.model, self.instruction, self.width = spec.model, spec.instruction, spec.width
        self.source = self._vectors.source
        self._documents = [document_of(record) for record in self._vectors.items()]
        self._rows = {document.id: row for row, document in enumerate(self._documents)}
        if len(self._rows) < len(self._documents):
            raise SearchError(repeated_id(folder, [found.id for found in self._documents]))
        self._modalities = np.array(
            [MODALITIES.index(document.modality) for document in self._documents], np.int8
        )
        self._names = {name for document in self._documents for name in document.fields}
        held = 4 * len(self) * self.width <= _HELD_BYTES
        self._held = self._read() if held else None
        # A product of matrices takes all cores: several at once only slow each other down.
        self._alone = threading.Lock()
        self._waiting: list[_Call] = []
        self._matching = lru_cache(_FILTERS_HELD)(self._match)

    def __len__(self) -> int:
        return len(self._documents)

    def search(
        self,
        vectors: Float[ndarray, "queries width"],
        k: int,
        *,
        modality: Modality | None = None,
        filter: str | None = None,  # noqa: A002
    ) -> list[list[Hit]]:
        """Return the k best documents of each query; see `Index.search`.

        Calls of several threads that wait at the same time share one pass over the vectors, so that
        a score may differ in its last digits from that of a call alone.
        """
        check_queries(vectors, k, self.width)
        mask = self._matching(modality, filter)
        call = _Call(vectors, k, (modality, filter))
        self._waiting.append(call)
        with self._alone:
            try:
                if call.found is None:
                    calls = [each for each in self._waiting if each.among == call.among]
                    self._answer([each for each in calls if each.found is None], mask)
            finally:
                self._waiting.remove(call)
        assert call.found is not None
        return [
            [Hit(self._documents[row], score) for score, row in of_query] for of_query in call.found
        ]

    def documents(self, ids: Sequence[str]) -> list[Document | None]:
        """Return the documents with these ids; None for an id that the index does not hold."""
        rows = [self._rows.get(identifier) for identifier in ids]
        return [None if row is None else self._documents[row] for row in rows]

    def vectors(self, ids: Sequence[str]) -> Float[ndarray, "n width"]:
        """Return the float32 vectors of these ids; see `Index.vectors`."""
        for identifier in ids:
            if identifier not in self._rows:
                raise SearchError(f'the index holds no document "{identifier}"')
        rows = np.array([self._rows[identifier] for identifier in ids], np.int64)
        unique, places = np.unique(rows, return_inverse=True)
        empty = np.zeros((0, self.width), np.float32)
        return np.concatenate([empty, *self._pool(unique)])[places]

    def close(self) -> None:
        """Let go of the vectors."""
        self._held = None

    def _answer(self, calls: list[_Call], mask: Bool[ndarray, "n"]) -> None:
        """Find what calls among the same documents ask for, in one pass."""
        rows = None if mask.all() else np.flatnonzero(mask)
        queries = np.concatenate([call.vectors for call in calls])
        scores, places = top_k(queries, self._pool(rows), max(call.k for call in calls))
        first = 0
        for call in calls:
            of_call = slice(first, first + len(call.vectors))
            first += len(call.vectors)
            call.found = [
                [
                    (float(score), int(place if rows is None else rows[place]))
                    for score, place in zip(*of_query, strict=True)
                    if place >= 0
                ]
                for of_query in zip(
                    scores[of_call, : call.k], places[of_call, : call.k], strict=True
                )
            ]

    def _pool(self, rows: Int[ndarray, "n"] | None) -> Iterator[Float[ndarray, "_ width"]]:
        """Yield the vectors of some rows, which ascend, or of all."""
        if self._held is None:
            yield from self._vectors.parts(only=rows)
        elif rows is None:
            yield self._held
        else:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                yield self._held[rows[start : start + _ROWS_AT_ONCE]]

    def _read(self) -> Float[ndarray, "n width"]:
        """Return all vectors."""
        held = np.empty((len(self), self.width), np.float32)
        first = 0
        for part in self._vectors.parts():
            held[first : first + len(part)] = part
            first += len(part)
        return held

    def _match(self, modality: Modality | None, text: str | None) -> Bool[ndarray, "n"]:
        """Return which documents a query may find."""
        mask = np.ones(len(self), bool)
        if modality is not None:
            mask = self._modalities == MODALITIES.index(modality)
        if text is None:
            return mask
        found = parse_filter(text)
        for name in sorted(found.names - self._names):
            raise SearchError(unknown_field(name))
        for row in np.flatnonzero(mask):
            document = self._documents[row]
            mask[row] = found.matches(document.id, document.fields)
        return mask


def document_of(record: ItemRecord) -> Document:
    """Return the document of a record."""
    image = None if record.image is None else record.image.path
    return Document(record.id, record.text, image, record.fields)


def check_queries(vectors: Float[ndarray, "queries width"], k: int, width: int) -> None:
    """Refuse queries that no index can answer.

    Raises:
        SearchError: k is below 1, the vectors are not as wide as those of the index, or hold NaN or
            infinity.
    """
    if k < 1:
        raise SearchError(f"k is {k}, expected at least 1")
    if not np.isfinite(vectors).all():
        raise SearchError("the vector of the query holds NaN or infinity, expected finite numbers")
    if vectors.shape[1] != width:
        raise SearchError(
            f"the query has {vectors.shape[1]} values and the index {width}: "
            "embed queries with the model of the index"
        )


def unknown_field(name: str) -> str:
    """Return the message of a filter that names a field that no document has."""
    return f'the filter names the field "{name}", which no document of the index has'


def repeated_id(folder: str | os.PathLike[str], ids: Sequence[str]) -> str:
    """Return the message of a folder in which an id names several documents."""
    identifier, count = Counter(ids).most_common(1)[0]
    return (
        f'{folder} holds {count} documents with the id "{identifier}": give each its own and embed '
        "again"
    )
