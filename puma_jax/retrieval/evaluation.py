"""Evaluate a model on a benchmark in M-BEIR layout, on local pools and on the global one.

A document is embedded once, in however many pools and under however many ids it is; a query once
for each set. Search is exact, and the same on one device as on many; see `topk`.
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

from puma_jax.data.mbeir import TASKS, Benchmark, modality_code
from puma_jax.data.mbeir.lines import FilePath
from puma_jax.embedder import RawItem
from puma_jax.errors import ConfigError, EvaluationError
from puma_jax.retrieval.metrics import bootstrap_interval, first_relevant
from puma_jax.retrieval.report import Evaluation, Pool, Run, SetResult, headline_k
from puma_jax.retrieval.selection import QuerySet, Selection, Subset, select
from puma_jax.retrieval.topk import top_k
from puma_jax.typing import Float, Int, ndarray

__all__ = ["Evaluation", "Subset", "evaluate", "evaluate_selection"]

Encode = Callable[[Sequence[RawItem]], ndarray]
"""From items to unit vectors, `[n, width]`, in the same order; such as `Embedder.encode`."""

_ITEMS_AT_ONCE = 1 << 16  # a call of an embedder may cost a compilation
_TILE = 4096


def evaluate(
    benchmark: Benchmark,
    encode: Encode,
    *,
    split: str = "test",
    ks: Collection[int] = (1, 5, 10, 20, 50),
    limits: Subset | None = None,
    scratch: FilePath | None = None,
    progress: bool = True,
) -> Evaluation:
    """Return how well a model finds what the queries of a split ask for.

    See `selection.select` for what is chosen and for errors, and `evaluate_selection` for the
    rest. Which instruction a query is asked with depends on its id alone, so that no seed and no
    order of files changes a result.

    Args:
        benchmark: The files, as `mbeir.discover` finds them.
        encode: The model: `Embedder.encode`, or any function from items to unit vectors.
        split: Of the queries.
        ks: Where to count hits; the k of a set's headline number is always counted, too.
        limits: Some queries and documents only, for evaluation while a model is trained.
        scratch: Folder for the documents' vectors, if memory is too small for them; they are
            removed in the end.
        progress: Whether to show a bar.
    """
    selection = select(benchmark, split, limits)
    return evaluate_selection(selection, encode, ks=ks, scratch=scratch, progress=progress)


def evaluate_selection(
    selection: Selection,
    encode: Encode,
    *,
    ks: Collection[int] = (1, 5, 10, 20, 50),
    scratch: FilePath | None = None,
    progress: bool = True,
) -> Evaluation:
    """Return how well a model finds what was selected, which can be used again and again.

    Arguments are those of `evaluate`.

    Raises:
        ConfigError: A k is below 1.
        EvaluationError: `encode` does not return one finite vector for each item.
    """
    if min(ks, default=1) < 1:
        raise ConfigError(f"k is {min(ks)}, expected at least 1")
    depth = max((*ks, *(headline_k(asked.name) for asked in selection.sets)))
    items = [item for asked in selection.sets for item in asked.items]
    qids = [qid for asked in selection.sets for qid in asked.qids]
    order = selection.reading_order()
    total = len(items) + len(order)
    bar = tqdm(total=total, desc=f"embedding {selection.split}", unit="item", disable=not progress)
    with contextlib.ExitStack() as stack:
        folder = None
        if scratch is not None:
            Path(scratch).mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch)))
        with bar:
            embed = _Embedding(encode, bar)
            queries = embed("query", qids, items.__getitem__, np.arange(len(items)))
            documents = embed("document", selection.dids, selection.document, order, folder)
        search = partial(_search, documents=documents, first=selection.first, depth=depth)
        # All queries at once: the global pool is read once, not for every set.
        everywhere = search(queries, pool=selection.pool)
        results, first = [], 0
        for asked in selection.sets:
            own = slice(first, first + len(asked.qids))
            first = own.stop
            ranked: dict[Pool, _Ranked] = {
                "local": search(queries[own], pool=asked.pool),
                "global": _Ranked(everywhere.scores[own], everywhere.rows[own]),
            }
            results.append(_result(selection, asked, ranked, ks))
    return Evaluation(split=selection.split, documents=len(selection.pool), sets=tuple(results))


@dataclass(frozen=True)
class _Embedding:
    """Embeds items some at a time."""

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
            kind: What they are, for error messages.
            names: Their ids.
            item: Returns one of them.
            order: Those that are embedded, in turn; the vectors of others are left undefined.
            folder: Where the vectors are kept; None for memory.
        """
        vectors: ndarray | None = None
        for start in range(0, len(order), _ITEMS_AT_ONCE):
            rows = order[start : start + _ITEMS_AT_ONCE]
            # Long and short, with and without images: an embedder then meets the same mixture all
            # along, fills the same shape of rows, and compiles once.
            rows = np.random.default_rng(0).permutation(rows)
            items = _Watched([item(row) for row in rows.tolist()], self.bar)
            new = np.asarray(self.encode(items), np.float32)
            self.bar.update(len(rows) - items.seen)  # what encode did not read one by one
            if new.ndim != 2 or len(new) != len(rows):
                raise EvaluationError(
                    f"encode returned an array of shape {new.shape} for {len(rows)} items, "
                    "expected one vector for each"
                )
            broken = np.flatnonzero(~np.isfinite(new).all(1))
            if len(broken):
                name = names[rows[broken[0]]]
                raise EvaluationError(
                    f"{len(broken):,} of {len(rows):,} vectors are not finite, the first that of "
                    f'{kind} "{name}": look at the model\'s weights and dtype'
                )
            if vectors is None:
                shape = len(names), new.shape[1]
                vectors = (
                    np.empty(shape, np.float32)
                    if folder is None
                    else np.memmap(folder / "vectors.float32", np.float32, "w+", shape=shape)
                )
            vectors[rows] = new
        assert vectors is not None  # there is no selection without queries and documents
        return vectors


class _Watched(list[RawItem]):
    """Items that move a bar on when they are read."""

    def __init__(self, items: list[RawItem], bar: tqdm):
        super().__init__(items)
        self.bar = bar
        self.seen = 0

    def __iter__(self) -> Iterator[RawItem]:
        for item in super().__iter__():
            yield item
            if self.seen < len(self):  # not when they are read a second time
                self.seen += 1
                self.bar.update()


class _Ranked(NamedTuple):
    """What queries found, best first."""

    scores: Float[ndarray, "queries depth"]
    rows: Int[ndarray, "queries depth"]
    """Documents of the selection; -1 where a pool had no more."""


def _search(
    queries: Float[ndarray, "queries width"],
    *,
    documents: Float[ndarray, "documents width"],
    first: Int[ndarray, "documents"],
    pool: Int[ndarray, "documents_of_pool"],
    depth: int,
) -> _Ranked:
    """Search the documents that are in a pool.

    Those that are equal are searched as one: a matrix product rounds equal rows differently.
    """
    _, lowest, one_of, counts = np.unique(
        first[pool], return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(lowest)  # of equal documents, the first in the pool
    ones = first[pool[lowest[order]]]
    parts = (documents[ones[start : start + _TILE]] for start in range(0, len(ones), _TILE))
    scores, places = top_k(queries, parts, depth)
    if len(ones) == len(pool):
        return _Ranked(scores, np.where(places < 0, -1, pool[places]))
    place_of = np.argsort(order)[one_of]
    return _expanded(scores, places, counts[order], pool[np.argsort(place_of, kind="stable")])


def _expanded(
    scores: Float[ndarray, "queries depth"],
    places: Int[ndarray, "queries depth"],
    counts: Int[ndarray, "ones"],
    members: Int[ndarray, "documents_of_pool"],
) -> _Ranked:
    """Put all documents that are equal in the place of the one that was found.

    Args:
        scores: Of those that were found.
        places: Which of `counts` they are; -1 for none.
        counts: How many documents are equal to each, itself included.
        members: These documents, group after group, each in the order of its rows.
    """
    depth = scores.shape[1]
    starts, most = np.cumsum(counts) - counts, np.minimum(counts, depth)
    out = _Ranked(np.full_like(scores, -np.inf), np.full_like(places, -1))
    for query, found in enumerate(places):
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
    selection: Selection, asked: QuerySet, ranked: dict[Pool, _Ranked], ks: Collection[int]
) -> SetResult:
    """Return how well the queries of a set did."""
    k, count = headline_k(asked.name), len(asked.qids)
    first = {pool: first_relevant(found.rows, asked.relevant) for pool, found in ranked.items()}
    hits = {
        pool: {at: float(np.mean(of_pool < at)) for at in sorted({*ks, k})}
        for pool, of_pool in first.items()
    }
    # An empty place is of no wrong modality, and has no id.
    target = modality_code(TASKS[asked.task][1])
    wrong = np.append(selection.modalities, target)[ranked["global"].rows] != target
    names = np.array([*selection.dids, None], object)
    return SetResult(
        name=asked.name,
        task=asked.task,
        queries=count,
        documents=len(asked.pool),
        k=k,
        hits=hits,
        interval={
            pool: bootstrap_interval([of_pool[k]], [count]) for pool, of_pool in hits.items()
        },
        wrong_modality={at: float(np.mean(wrong[:, :at].any(1))) for at in sorted({1, *ks})},
        runs={
            pool: Run(asked.qids, names[found.rows], found.scores) for pool, found in ranked.items()
        },
    )
