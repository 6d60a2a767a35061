"""Search in the pools of a benchmark, in which several ids may have the same document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from puma_jax.progress import Progress
from puma_jax.search.topk import top_k
from puma_jax.typing import Float, Int, ndarray

_TILE = 4096


@runtime_checkable
class Rows(Protocol):
    """Vectors by row: an array, or what reads them when they are asked for."""

    def __getitem__(self, rows: Int[ndarray, "n"], /) -> Float[ndarray, "n width"]:
        """Return some rows in memory."""
        ...


class SearchResult(NamedTuple):
    """Scores and documents that queries found, best first."""

    scores: Float[ndarray, "queries depth"]
    rows: Int[ndarray, "queries depth"]
    """Rows of documents in the selection; -1 beyond the end of a small pool."""


def search_pool(
    queries: Float[ndarray, "queries width"],
    *,
    documents: Rows,
    representative: Int[ndarray, "documents"],
    pool: Int[ndarray, "documents_of_pool"],
    depth: int,
    bar: Progress,
) -> SearchResult:
    """Return the best documents of a pool for each query.

    Equal documents are searched as one group, through their representative: a matrix product
    rounds equal rows differently.

    Args:
        queries: Query vectors.
        documents: Document vectors, of all representatives at least.
        representative: For every document, the one whose vector it has.
        pool: Rows of the documents to search.
        depth: Number of documents to return for each query.
        bar: Counts pairs of a query and a document.
    """
    _, first_in_pool, group_of, sizes = np.unique(
        representative[pool], return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first_in_pool)  # groups in the order of their first documents
    unique = representative[pool[first_in_pool[order]]]

    def tiles() -> Iterator[Float[ndarray, "_ width"]]:
        for start in range(0, len(unique), _TILE):
            tile = unique[start : start + _TILE]
            yield documents[tile]
            bar.update(len(queries) * len(tile))

    scores, groups = top_k(queries, tiles(), depth)
    bar.update(len(queries) * (len(pool) - len(unique)))
    if len(unique) == len(pool):
        return SearchResult(scores, np.where(groups < 0, -1, pool[groups]))
    group_of = np.argsort(order)[group_of]
    members = pool[np.argsort(group_of, kind="stable")]
    return _expand_groups(scores, groups, sizes[order], members)


def _expand_groups(
    scores: Float[ndarray, "queries depth"],
    groups: Int[ndarray, "queries depth"],
    sizes: Int[ndarray, "groups"],
    members: Int[ndarray, "documents_of_pool"],
) -> SearchResult:
    """Return the documents of the groups that were found, at most `depth` for each query.

    Args:
        scores: Scores of the groups found, best first.
        groups: The groups found; -1 for none.
        sizes: Number of equal documents in each group.
        members: Rows of these documents, group after group, ascending within each.
    """
    depth = scores.shape[1]
    starts, most = np.cumsum(sizes) - sizes, np.minimum(sizes, depth)
    out = SearchResult(np.full_like(scores, -np.inf), np.full_like(groups, -1))
    for query, found in enumerate(groups):
        found = found[found >= 0]
        taken = most[found]
        within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        rows = members[np.repeat(starts[found], taken) + within]
        of_row = np.repeat(scores[query, : len(found)], taken)
        best = np.lexsort((rows, -of_row))[:depth]
        out.scores[query, : len(best)] = of_row[best]
        out.rows[query, : len(best)] = rows[best]
    return out
