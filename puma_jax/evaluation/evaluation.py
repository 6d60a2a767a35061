"""Evaluate a model on a benchmark in M-BEIR layout, on local pools and on the global one.

A document is embedded once, whatever the number of pools and ids it has; a query is embedded once
for each set. What cannot be read is an error, or left out and counted. Search is exact and gives
the same result on any number of devices; see `search.topk`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from puma_jax.data.lines import OnBadRecord
from puma_jax.data.mbeir import TASKS, Benchmark, modality_code
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError, DataError
from puma_jax.evaluation.encoding import Batches, Encode, ItemEncoder, Sources
from puma_jax.evaluation.metrics import bootstrap_interval, first_relevant
from puma_jax.evaluation.ranking import Run
from puma_jax.evaluation.report import Evaluation, Pool, SetResult, headline_k
from puma_jax.evaluation.selection import QuerySet, Selection, Subset, select
from puma_jax.evaluation.vector_folder import GatheredRows, VectorFolder
from puma_jax.progress import Progress
from puma_jax.search.topk import top_k
from puma_jax.typing import Bool, Float, Int, ndarray

__all__ = ["Encode", "Evaluation", "Subset", "evaluate", "evaluate_selection"]

KS = (1, 5, 10, 20, 50)
"""Depths at which hits are counted by default."""

_TILE = 4096


def evaluate(
    benchmark: Benchmark,
    model: Embedder | Encode,
    *,
    split: str = "test",
    ks: Collection[int] = KS,
    limits: Subset | None = None,
    on_bad_record: OnBadRecord = "error",
    vectors: VectorFolder | None = None,
    progress: bool = True,
) -> Evaluation:
    """Return the hit rates of a model on the queries of a split.

    See `selection.select` for the choice of queries and documents, and `evaluate_selection`; both
    list errors. The instruction of a query depends on its id alone, so that no seed and no order
    of files changes a result.

    Args:
        benchmark: The files, as `mbeir.discover` finds them.
        model: An embedder, or any function from items to unit vectors.
        split: Split of the queries.
        ks: Depths at which hits are counted, besides the k of each set's headline number.
        limits: How many queries and documents to use, for evaluation during training; None uses
            all.
        on_bad_record: "error" stops at a record or image that cannot be read, "skip" leaves it out
            and counts it. A function cannot skip images.
        vectors: Folder for the vectors, from `vector_folder`, if memory is too small for them or a
            rerun is to resume; None keeps them in memory.
        progress: Whether to show progress bars.
    """
    selection = select(benchmark, split, limits, on_bad_record=on_bad_record)
    return evaluate_selection(
        selection, model, ks=ks, on_bad_record=on_bad_record, vectors=vectors, progress=progress
    )


def evaluate_selection(
    selection: Selection,
    model: Embedder | Encode,
    *,
    ks: Collection[int] = KS,
    on_bad_record: OnBadRecord = "error",
    vectors: VectorFolder | None = None,
    progress: bool = True,
) -> Evaluation:
    """Return the hit rates of a model on a selection, which can be evaluated many times.

    Arguments are those of `evaluate`.

    Raises:
        ConfigError: A k is below 1.
        DataError: An item cannot be read and `on_bad_record` is "error", or too few can.
        EvaluationError: `model` does not return one finite vector for each item.
    """
    if min(ks, default=1) < 1:
        raise ConfigError(f"k is {min(ks)}, expected at least 1")
    depth = max((*ks, *(headline_k(query_set.name) for query_set in selection.sets)))
    order = selection.reading_order()
    total = len(order) + sum(len(query_set.items) for query_set in selection.sets)
    bar = Progress(
        total=total, desc=f"embedding {selection.split}", unit="item", disable=not progress
    )
    skipped = replace(selection.skipped, messages=list(selection.skipped.messages))
    with bar:
        encode = ItemEncoder(model) if isinstance(model, Embedder) else model
        batches = Batches(encode, selection.root, bar, vectors, on_bad_record, skipped)
        queries, readable = batches.embed(*_queries(selection))
        documents, of_representative = batches.embed(
            Sources(
                "document",
                len(selection.dids),
                selection.document,
                selection.dids.__getitem__,
                selection.document_error,
            ),
            order,
        )
    queries = queries[np.flatnonzero(readable)]
    sets = _readable_sets(selection, readable, of_representative[selection.representative])
    pool = selection.pool[of_representative[selection.representative[selection.pool]]]
    pairs = sum(len(found.qids) * (len(found.pool) + len(pool)) for found in sets)
    searching = Progress(
        total=pairs, desc="searching", unit="score", unit_scale=True, disable=not progress
    )
    with searching:
        search = partial(
            _search,
            documents=documents,
            representative=selection.representative,
            depth=depth,
            bar=searching,
        )
        # All queries are searched together, so that the global pool is read once.
        in_global_pool = search(queries, pool=pool)
        results, start = [], 0
        for query_set in sets:
            own = slice(start, start + len(query_set.qids))
            start = own.stop
            found: dict[Pool, SearchResult] = {
                "local": search(queries[own], pool=query_set.pool),
                "global": SearchResult(in_global_pool.scores[own], in_global_pool.rows[own]),
            }
            results.append(_result(selection, query_set, found, ks))
    return Evaluation(
        split=selection.split,
        documents=len(pool),
        sets=tuple(results),
        skipped=skipped.count,
        skipped_messages=tuple(skipped.messages),
        unused_files=selection.unused_files,
    )


def _queries(selection: Selection) -> tuple[Sources, Int[ndarray, "queries"]]:
    """Return the queries of all sets, and their order."""
    items = [item for query_set in selection.sets for item in query_set.items]
    qids = [qid for query_set in selection.sets for qid in query_set.qids]
    files = [query_set.file for query_set in selection.sets for _ in query_set.qids]

    def located(row: int, error: Exception) -> DataError:
        return DataError(f'{files[row]}: query "{qids[row]}": {error}')

    sources = Sources("query", len(items), items.__getitem__, qids.__getitem__, located)
    return sources, np.arange(len(items))


def _readable_sets(
    selection: Selection, queries: Bool[ndarray, "queries"], documents: Bool[ndarray, "documents"]
) -> list[QuerySet]:
    """Return the sets without what cannot be read."""
    ends = np.cumsum([len(query_set.qids) for query_set in selection.sets])
    parts = np.split(queries, ends[:-1])
    return [
        query_set.readable(part, documents)
        for query_set, part in zip(selection.sets, parts, strict=True)
    ]


class SearchResult(NamedTuple):
    """Scores and documents that queries found, best first."""

    scores: Float[ndarray, "queries depth"]
    rows: Int[ndarray, "queries depth"]
    """Rows of documents in the selection; -1 beyond the end of a small pool."""


def _search(
    queries: Float[ndarray, "queries width"],
    *,
    documents: ndarray | GatheredRows,
    representative: Int[ndarray, "documents"],
    pool: Int[ndarray, "documents_of_pool"],
    depth: int,
    bar: Progress,
) -> SearchResult:
    """Return the best documents of a pool for each query.

    Equal documents are searched as one group, through their representative: a matrix product
    rounds equal rows differently.
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


def _result(
    selection: Selection, query_set: QuerySet, found: dict[Pool, SearchResult], ks: Collection[int]
) -> SetResult:
    """Return the hit rates of a query set."""
    k = headline_k(query_set.name)
    names = np.array([*selection.dids, None], object)
    return SetResult(
        name=query_set.name,
        task=query_set.task,
        queries=len(query_set.qids),
        documents=len(query_set.pool),
        k=k,
        **rates(selection, query_set, {pool: one.rows for pool, one in found.items()}, ks),
        left_out=query_set.left_out(),
        runs={
            pool: Run(query_set.qids, names[of_pool.rows], of_pool.scores, of_pool.rows)
            for pool, of_pool in found.items()
        },
    )


def rates(
    selection: Selection,
    query_set: QuerySet,
    found: Mapping[Pool, Int[ndarray, "queries depth"]],
    ks: Collection[int],
) -> dict[str, Any]:
    """Return the fields of a `SetResult` that follow from what its queries found.

    Args:
        selection: What was evaluated.
        query_set: The queries.
        found: Rows of documents that they found in each pool, best first.
        ks: Depths at which hits are counted, besides the headline's.
    """
    k, count = headline_k(query_set.name), len(query_set.qids)
    rank = {pool: first_relevant(rows, query_set.relevant) for pool, rows in found.items()}
    hits = {
        pool: {at: float(np.mean(of_pool < at)) for at in sorted({*ks, k})}
        for pool, of_pool in rank.items()
    }
    # An empty place, row -1, has no id and counts as the right modality.
    target = modality_code(TASKS[query_set.task][1])
    wrong = np.append(selection.modalities, target)[found["global"]] != target
    return {
        "hits": hits,
        "interval": {
            pool: bootstrap_interval([of_pool[k]], [count]) for pool, of_pool in hits.items()
        },
        "wrong_modality": {at: float(np.mean(wrong[:, :at].any(1))) for at in sorted({1, *ks})},
    }
