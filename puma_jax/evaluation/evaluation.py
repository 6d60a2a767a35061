"""Evaluate a model on a benchmark in M-BEIR layout, on local pools and on the global one.

A document is embedded once, whatever the number of pools and ids it has; a query is embedded once
for each set. Search is exact and gives the same result on any number of devices; see `search.topk`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from puma_jax.data.lines import FilePath
from puma_jax.data.mbeir import TASKS, Benchmark, modality_code
from puma_jax.embedder import RawItem
from puma_jax.errors import ConfigError, EvaluationError
from puma_jax.evaluation.metrics import bootstrap_interval, first_relevant
from puma_jax.evaluation.report import Evaluation, Pool, Run, SetResult, headline_k
from puma_jax.evaluation.selection import QuerySet, Selection, Subset, select
from puma_jax.search.embedding import check_finite
from puma_jax.search.topk import top_k
from puma_jax.typing import Float, Int, ndarray

__all__ = ["Evaluation", "Subset", "evaluate", "evaluate_selection"]

Encode = Callable[[Sequence[RawItem]], ndarray]
"""Maps items to unit vectors, `[n, width]`, in the same order, such as `Embedder.encode`."""

_ITEMS_AT_ONCE = 1 << 16  # a call of an embedder may compile a program
_TILE = 4096


def evaluate(
    benchmark: Benchmark,
    encode: Encode,
    *,
    split: str = "test",
    ks: Collection[int] = (1, 5, 10, 20, 50),
    limits: Subset | None = None,
    vectors_dir: FilePath | None = None,
    progress: bool = True,
) -> Evaluation:
    """Return the hit rates of a model on the queries of a split.

    See `selection.select` for the choice of queries and documents, and `evaluate_selection`; both
    list errors. The instruction of a query depends on its id alone, so that no seed and no order
    of files changes a result.

    Args:
        benchmark: The files, as `mbeir.discover` finds them.
        encode: The model: `Embedder.encode`, or any function from items to unit vectors.
        split: Split of the queries.
        ks: Depths at which hits are counted, besides the k of each set's headline number.
        limits: How many queries and documents to use, for evaluation during training; None uses
            all.
        vectors_dir: Folder for the documents' vectors, if memory is too small for them; they are
            removed in the end.
        progress: Whether to show a progress bar.
    """
    selection = select(benchmark, split, limits)
    return evaluate_selection(selection, encode, ks=ks, vectors_dir=vectors_dir, progress=progress)


def evaluate_selection(
    selection: Selection,
    encode: Encode,
    *,
    ks: Collection[int] = (1, 5, 10, 20, 50),
    vectors_dir: FilePath | None = None,
    progress: bool = True,
) -> Evaluation:
    """Return the hit rates of a model on a selection, which can be evaluated many times.

    Arguments are those of `evaluate`.

    Raises:
        ConfigError: A k is below 1.
        EvaluationError: `encode` does not return one finite vector for each item.
    """
    if min(ks, default=1) < 1:
        raise ConfigError(f"k is {min(ks)}, expected at least 1")
    depth = max((*ks, *(headline_k(query_set.name) for query_set in selection.sets)))
    items = [item for query_set in selection.sets for item in query_set.items]
    qids = [qid for query_set in selection.sets for qid in query_set.qids]
    order = selection.reading_order()
    total = len(items) + len(order)
    bar = tqdm(total=total, desc=f"embedding {selection.split}", unit="item", disable=not progress)
    with contextlib.ExitStack() as stack:
        folder = None
        if vectors_dir is not None:
            Path(vectors_dir).mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=vectors_dir)))
        with bar:
            embed = _Embedding(encode, bar)
            queries = embed("query", qids, items.__getitem__, np.arange(len(items)))
            documents = embed("document", selection.dids, selection.document, order, folder)
        search = partial(
            _search, documents=documents, representative=selection.representative, depth=depth
        )
        # All queries are searched together, so that the global pool is read once.
        in_global_pool = search(queries, pool=selection.pool)
        results, start = [], 0
        for query_set in selection.sets:
            own = slice(start, start + len(query_set.qids))
            start = own.stop
            found: dict[Pool, SearchResult] = {
                "local": search(queries[own], pool=query_set.pool),
                "global": SearchResult(in_global_pool.scores[own], in_global_pool.rows[own]),
            }
            results.append(_result(selection, query_set, found, ks))
    return Evaluation(split=selection.split, documents=len(selection.pool), sets=tuple(results))


@dataclass(frozen=True)
class _Embedding:
    """Embeds items in large batches and checks the vectors."""

    encode: Encode
    bar: tqdm

    def __call__(
        self,
        kind: str,
        names: Sequence[str],
        item: Callable[[int], RawItem],
        order: Int[ndarray, "n"],
        folder: Path | None = None,
    ) -> Float[ndarray, "items width"]:
        """Return the vectors of items.

        Args:
            kind: "query" or "document", for error messages.
            names: Ids of all items.
            item: Returns the item of a row.
            order: Rows to embed, in this order; the vectors of other rows are undefined.
            folder: Folder of the file that holds the vectors; None keeps them in memory.
        """
        vectors: ndarray | None = None
        for start in range(0, len(order), _ITEMS_AT_ONCE):
            rows = order[start : start + _ITEMS_AT_ONCE]
            # Shuffled, so that each call has the same mixture of lengths and images: the embedder
            # then fills rows of one shape and compiles once.
            rows = np.random.default_rng(0).permutation(rows)
            items = _TrackedItems([item(row) for row in rows.tolist()], self.bar)
            new = np.asarray(self.encode(items), np.float32)
            self.bar.update(len(rows) - items.seen)  # items that encode did not iterate over
            if new.ndim != 2 or len(new) != len(rows):
                raise EvaluationError(
                    f"encode returned an array of shape {new.shape} for {len(rows)} items, "
                    "expected one vector for each"
                )
            check_finite(new, [names[row] for row in rows], kind)
            if vectors is None:
                shape = len(names), new.shape[1]
                vectors = (
                    np.empty(shape, np.float32)
                    if folder is None
                    else np.memmap(folder / "vectors.float32", np.float32, "w+", shape=shape)
                )
            vectors[rows] = new
        assert vectors is not None  # a selection has queries and documents
        return vectors


class _TrackedItems(list[RawItem]):
    """Items that advance a progress bar as they are iterated over."""

    def __init__(self, items: list[RawItem], bar: tqdm):
        super().__init__(items)
        self.bar = bar
        self.seen = 0

    def __iter__(self) -> Iterator[RawItem]:
        for item in super().__iter__():
            yield item
            if self.seen < len(self):  # not in a second iteration
                self.seen += 1
                self.bar.update()


class SearchResult(NamedTuple):
    """Scores and documents that queries found, best first."""

    scores: Float[ndarray, "queries depth"]
    rows: Int[ndarray, "queries depth"]
    """Rows of documents in the selection; -1 beyond the end of a small pool."""


def _search(
    queries: Float[ndarray, "queries width"],
    *,
    documents: Float[ndarray, "documents width"],
    representative: Int[ndarray, "documents"],
    pool: Int[ndarray, "documents_of_pool"],
    depth: int,
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
    tiles = (documents[unique[start : start + _TILE]] for start in range(0, len(unique), _TILE))
    scores, groups = top_k(queries, tiles, depth)
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
    k, count = headline_k(query_set.name), len(query_set.qids)
    rank = {
        pool: first_relevant(of_pool.rows, query_set.relevant) for pool, of_pool in found.items()
    }
    hits = {
        pool: {at: float(np.mean(of_pool < at)) for at in sorted({*ks, k})}
        for pool, of_pool in rank.items()
    }
    # An empty place, row -1, has no id and counts as the right modality.
    target = modality_code(TASKS[query_set.task][1])
    wrong = np.append(selection.modalities, target)[found["global"].rows] != target
    names = np.array([*selection.dids, None], object)
    return SetResult(
        name=query_set.name,
        task=query_set.task,
        queries=count,
        documents=len(query_set.pool),
        k=k,
        hits=hits,
        interval={
            pool: bootstrap_interval([of_pool[k]], [count]) for pool, of_pool in hits.items()
        },
        wrong_modality={at: float(np.mean(wrong[:, :at].any(1))) for at in sorted({1, *ks})},
        runs={
            pool: Run(query_set.qids, names[of_pool.rows], of_pool.scores)
            for pool, of_pool in found.items()
        },
    )
