"""Evaluate a model on a benchmark in M-BEIR layout, on local pools and on the global one.

A document is embedded once, whatever the number of pools and ids it has; a query is embedded once
for each set. What cannot be read is an error, or left out and counted. Search is exact and gives
the same result on any number of devices; see `search.topk`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from puma_jax.data.lines import BadRecords, OnBadRecord
from puma_jax.data.mbeir import TASKS, Benchmark, modality_code
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError, DataError
from puma_jax.evaluation.encoding import Batches, Encode, ItemEncoder, Sources
from puma_jax.evaluation.metrics import bootstrap_interval, first_relevant
from puma_jax.evaluation.pool_search import Rows, SearchResult, search_pool
from puma_jax.evaluation.ranking import Run
from puma_jax.evaluation.report import Evaluation, Pool, SetResult, headline_k
from puma_jax.evaluation.selection import QuerySet, Selection, Subset, select
from puma_jax.evaluation.vector_folder import VectorFolder
from puma_jax.progress import Progress
from puma_jax.typing import Bool, Float, Int, ndarray

__all__ = ["Encode", "Evaluation", "Subset", "evaluate", "evaluate_selection"]

KS = (1, 5, 10, 20, 50)
"""Depths at which hits are counted by default."""

Search = Callable[[slice, Int[ndarray, "documents"], int, Progress], SearchResult]
"""Returns what some queries find in a pool, so deep; the bar counts pairs of both."""


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

    Arguments are those of `evaluate`, and errors those of `embed_selection`.

    Raises:
        ConfigError: A k is below 1.
    """
    if min(ks, default=1) < 1:
        raise ConfigError(f"k is {min(ks)}, expected at least 1")
    embedded = embed_selection(
        selection, model, on_bad_record=on_bad_record, vectors=vectors, progress=progress
    )
    return embedded.evaluate(ks=ks, progress=progress)


@dataclass(frozen=True)
class EmbeddedSelection:
    """The vectors of a selection, and what of it can be read."""

    selection: Selection
    queries: Float[ndarray, "queries width"]
    """Those of the readable queries of all sets, set after set."""
    documents: Rows
    """By rows of the selection; of representatives only."""
    sets: list[QuerySet]
    """The sets, without what cannot be read."""
    pool: Int[ndarray, "documents"]
    """Readable documents of the global pool."""
    skipped: BadRecords

    def evaluate(
        self, search: Search | None = None, *, ks: Collection[int] = KS, progress: bool = True
    ) -> Evaluation:
        """Return the hit rates on all sets.

        Args:
            search: Finds the documents of a pool; by default those with the highest inner products.
            ks: Depths at which hits are counted, besides the k of each set's headline number.
            progress: Whether to show a progress bar.
        """
        depth = max((*ks, *(headline_k(query_set.name) for query_set in self.sets)))
        pairs = sum(len(found.qids) * (len(found.pool) + len(self.pool)) for found in self.sets)
        bar = Progress(
            total=pairs, desc="searching", unit="score", unit_scale=True, disable=not progress
        )
        search = search or self.search
        with bar:
            # All queries are searched together, so that the global pool is read once.
            in_global_pool = search(slice(None), self.pool, depth, bar)
            results, start = [], 0
            for query_set in self.sets:
                own = slice(start, start + len(query_set.qids))
                start = own.stop
                found: dict[Pool, SearchResult] = {
                    "local": search(own, query_set.pool, depth, bar),
                    "global": SearchResult(in_global_pool.scores[own], in_global_pool.rows[own]),
                }
                results.append(_result(self.selection, query_set, found, ks))
        return Evaluation(
            split=self.selection.split,
            documents=len(self.pool),
            sets=tuple(results),
            skipped=self.skipped.count,
            skipped_messages=tuple(self.skipped.messages),
            unused_files=self.selection.unused_files,
        )

    def search(
        self, own: slice, pool: Int[ndarray, "documents"], depth: int, bar: Progress
    ) -> SearchResult:
        """Return the best documents of a pool for some queries; see `search_pool`."""
        return search_pool(
            self.queries[own],
            documents=self.documents,
            representative=self.selection.representative,
            pool=pool,
            depth=depth,
            bar=bar,
        )


def embed_selection(
    selection: Selection,
    model: Embedder | Encode,
    *,
    on_bad_record: OnBadRecord = "error",
    vectors: VectorFolder | None = None,
    progress: bool = True,
) -> EmbeddedSelection:
    """Return the vectors of a selection. Arguments are those of `evaluate`.

    Raises:
        DataError: An item cannot be read and `on_bad_record` is "error", or too few can.
        EvaluationError: `model` does not return one finite vector for each item.
    """
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
    return EmbeddedSelection(
        selection,
        queries[np.flatnonzero(readable)],
        documents,
        _readable_sets(selection, readable, of_representative[selection.representative]),
        selection.pool[of_representative[selection.representative[selection.pool]]],
        skipped,
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
