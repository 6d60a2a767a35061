"""What vectors of fewer bytes find: shortened, int8, or one bit for each value.

All of it is computed from the vectors of one embedding pass. Queries are float32 unless it says
otherwise; only documents are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from puma_jax.config import require
from puma_jax.evaluation.evaluation import KS, EmbeddedSelection, Evaluation
from puma_jax.evaluation.pool_search import Rows, SearchResult, search_pool
from puma_jax.evaluation.report import POOLS, markdown
from puma_jax.forward import first_values
from puma_jax.progress import Progress
from puma_jax.search.quantize import bytes_per_vector, from_int8, to_int8
from puma_jax.typing import Float, Int, ndarray

StoredPrecision = Literal["float32", "int8", "ubinary"]
Rescored = Literal["bits", "float32"]

_QUERIES_AT_ONCE = 64


@dataclass(frozen=True)
class Size:
    """How documents are stored and searched."""

    precision: StoredPrecision
    dimensions: int
    rescored: Rescored | None = None
    """The form in which float32 queries score the first documents by Hamming distance again: their
    bits, or their float32 vectors, which are kept elsewhere. None does not score them again."""

    @property
    def title(self) -> str:
        """The name of the row in a table."""
        return self.precision + (f", rescored by {self.rescored}" if self.rescored else "")

    @property
    def bytes(self) -> int:
        """Bytes of a vector that is searched."""
        return bytes_per_vector(self.precision, self.dimensions)


def sizes_of(
    precisions: Sequence[StoredPrecision], dimensions: Sequence[int], width: int
) -> list[Size]:
    """Return every precision in every number of dimensions, bits in all three ways to score them.

    Args:
        precisions: Precisions; float32 if there are none.
        dimensions: Numbers of values; the width if there are none.
        width: Number of values that the model gives.

    Raises:
        ConfigError: The model has not as many values.
    """
    found = []
    for count in dict.fromkeys(dimensions or (width,)):
        require(1 <= count <= width, f"dimensions {count} must be in [1, {width}]")
        for precision in dict.fromkeys(precisions or ("float32",)):
            found.append(Size(precision, count))
            if precision == "ubinary":
                found += [Size(precision, count, "bits"), Size(precision, count, "float32")]
    return found


def evaluate_sizes(
    embedded: EmbeddedSelection,
    sizes: Sequence[Size],
    *,
    multiplier: int = 4,
    ks: Collection[int] = KS,
    progress: bool = True,
) -> dict[Size, Evaluation]:
    """Return the hit rates of each size.

    Args:
        embedded: The vectors.
        sizes: How documents are stored and searched.
        multiplier: Documents that are rescored, as a multiple of the deepest k that is counted.
        ks: Depths at which hits are counted, besides the k of each set's headline number.
        progress: Whether to show progress bars.

    Raises:
        EvaluationError: The first values of a vector are all zero.
    """
    return {
        size: embedded.evaluate(_Search(embedded, size, multiplier), ks=ks, progress=progress)
        for size in sizes
    }


def sizes_table(whole: Evaluation, found: dict[Size, Evaluation]) -> str:
    """Return a markdown table: bytes of a vector, and mean hit rates in percent.

    The last columns are percentages of the hit rates of float32 vectors of all values.
    """
    header = ["vectors", "values", "bytes", *(f"{pool} @k" for pool in POOLS)]
    header += [f"{pool} kept" for pool in POOLS]
    rows = []
    for size, evaluation in found.items():
        cells = [size.title, f"{size.dimensions:,}", f"{size.bytes:,}"]
        rows.append([*cells, *rates_and_kept(evaluation, whole)])
    return markdown(header, rows)


def rates_and_kept(evaluation: Evaluation, whole: Evaluation) -> list[str]:
    """Return the mean hit rate of each pool, and then its share of the whole's, in percent."""
    rates = [evaluation.mean(pool) for pool in POOLS]
    kept = [
        f"{100 * rate / whole.mean(pool):.1f}" if whole.mean(pool) else "–"
        for rate, pool in zip(rates, POOLS, strict=True)
    ]
    return [*(f"{100 * rate:.1f}" for rate in rates), *kept]


def sizes_json(found: dict[Size, Evaluation], multiplier: int) -> dict[str, Any]:
    """Return all numbers as JSON values."""
    return {
        "rescore_multiplier": multiplier,
        "sizes": [
            {**vars(size), "bytes": size.bytes, "evaluation": evaluation.to_json()}
            for size, evaluation in found.items()
        ],
    }


@dataclass(frozen=True)
class _Search:
    """Finds documents as an index of some size does. Called as `evaluation.Search`."""

    embedded: EmbeddedSelection
    size: Size
    multiplier: int

    def __call__(
        self, own: slice, pool: Int[ndarray, "documents"], depth: int, bar: Progress
    ) -> SearchResult:
        queries = self._shortened(self.embedded.queries[own])
        found = search_pool(
            _signs(queries) if self.size.precision == "ubinary" else queries,
            documents=_View(self.embedded.documents, self._stored),
            representative=self.embedded.selection.representative,
            pool=pool,
            depth=depth * self.multiplier if self.size.rescored else depth,
            bar=bar,
        )
        return self._rescored(queries, found, depth) if self.size.rescored else found

    def _shortened(self, vectors: Float[ndarray, "n width"]) -> Float[ndarray, "n dimensions"]:
        return first_values(vectors, self.size.dimensions, "vector {} of a pass".format)

    def _stored(self, vectors: Float[ndarray, "n width"]) -> Float[ndarray, "n dimensions"]:
        """Return what documents are compared by."""
        short = self._shortened(vectors)
        if self.size.precision == "int8":
            return from_int8(*to_int8(short))
        # The inner product of signs is the dimensions less twice the distance, without rounding.
        return _signs(short) if self.size.precision == "ubinary" else short

    def _rescored(
        self, queries: Float[ndarray, "queries dimensions"], found: SearchResult, depth: int
    ) -> SearchResult:
        """Return the best of the documents found, by the float32 vectors of queries."""
        representative = self.embedded.selection.representative
        out = SearchResult(found.scores[:, :depth].copy(), found.rows[:, :depth].copy())
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            rows = found.rows[some]
            filled = np.where(rows < 0, rows[:, :1], rows)  # no place is empty before the first
            unique, places = np.unique(representative[filled], return_inverse=True)
            vectors = self._shortened(self.embedded.documents[unique])
            if self.size.rescored == "bits":
                vectors = _signs(vectors) * np.float32(self.size.dimensions**-0.5)
            # In float64, so that equal documents have equal scores.
            scores = np.matmul(
                vectors.astype(np.float64)[places.reshape(rows.shape)],
                queries[some, :, None].astype(np.float64),
            )[..., 0].astype(np.float32)
            scores[rows < 0] = -np.inf
            best = np.lexsort((rows, -scores), axis=-1)[:, :depth]
            out.scores[some] = np.take_along_axis(scores, best, 1)
            out.rows[some] = np.take_along_axis(rows, best, 1)
        return out


@dataclass(frozen=True)
class _View:
    """Documents as they are compared, computed when they are read."""

    documents: Rows
    stored: Callable[[Float[ndarray, "n width"]], Float[ndarray, "n dimensions"]]

    def __getitem__(self, rows: Int[ndarray, "n"]) -> Float[ndarray, "n dimensions"]:
        return self.stored(self.documents[rows])


def _signs(vectors: Float[ndarray, "n width"]) -> Float[ndarray, "n width"]:
    return np.where(vectors > 0, np.float32(1), np.float32(-1))
