"""Rerank what queries found: the first documents of each pool, by the scores of a reranker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from puma_jax.errors import ConfigError
from puma_jax.evaluation.evaluation import rates
from puma_jax.evaluation.ranking import Run
from puma_jax.evaluation.report import Evaluation, SetResult
from puma_jax.evaluation.selection import QuerySet, Selection
from puma_jax.parallel import multihost
from puma_jax.progress import Progress
from puma_jax.reranker import Pair
from puma_jax.typing import Float, Int, ndarray

ScorePairs = Callable[[Iterable[Pair]], Float[ndarray, "n"]]
"""Maps pairs of a query and a document to scores, the higher the better."""

# States of so many pairs are in memory at once.
_PAIRS_AT_ONCE = 1 << 14


def rerank(
    selection: Selection,
    evaluation: Evaluation,
    score: ScorePairs,
    *,
    top: int = 50,
    progress: bool = True,
) -> Evaluation:
    """Return the evaluation after the first documents of each query are ordered anew.

    Both pools are reranked, each from its own first documents. Documents of equal scores, and those
    behind the first `top`, keep their order. A query's instruction is that of the pair.

    Args:
        selection: What was evaluated.
        evaluation: The evaluation, with runs.
        score: Returns the scores of pairs of a query and a document, such as
            `Reranker.score_pairs`.
        top: Number of documents of each query and pool to score.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: `top` is below 1, or above the number of documents that the runs hold.
    """
    depth = min(run.rows.shape[1] for found in evaluation.sets for run in found.runs.values())
    if not 1 <= top <= depth:
        raise ConfigError(f"rerank_top is {top}, expected 1 to {depth}, the depth of the runs")
    total = sum(len(_pairs(selection, found, top)) for found in evaluation.sets)
    with Progress(total=total, desc="reranking", unit="pair", disable=not progress) as bar:
        results = []
        for query_set, found in zip(selection.sets, evaluation.sets, strict=True):
            scores = _scores(selection, query_set, found, score, top, bar)
            results.append(_reranked(selection, query_set, found, scores, top))
    return replace(evaluation, sets=tuple(results))


def _pairs(selection: Selection, found: SetResult, top: int) -> Int[ndarray, "pairs 2"]:
    """Return the pairs to score, each once: numbers of queries and rows of representatives."""
    pairs = [
        np.stack([np.repeat(np.arange(len(run.qids)), top), run.rows[:, :top].reshape(-1)], 1)
        for run in found.runs.values()
    ]
    joined = np.concatenate(pairs)
    joined = joined[joined[:, 1] >= 0]  # -1 is beyond the end of a small pool
    joined[:, 1] = selection.representative[joined[:, 1]]
    return np.unique(joined, axis=0)


def _scores(
    selection: Selection,
    query_set: QuerySet,
    found: SetResult,
    score: ScorePairs,
    top: int,
    bar: Progress,
) -> dict[tuple[int, int], float]:
    """Return the score of each pair of a query and a document."""
    numbers = {qid: number for number, qid in enumerate(query_set.qids)}
    items = [query_set.items[numbers[qid]] for qid in next(iter(found.runs.values())).qids]

    def scores_of(numbered: Sequence[tuple[int, int]]) -> Float[ndarray, "n 1"]:
        pairs = ((items[query], selection.document(row)) for query, row in numbered)
        return np.asarray(score(pairs), np.float32)[:, None]

    pairs = [(query, row) for query, row in _pairs(selection, found, top).tolist()]
    scored: dict[tuple[int, int], float] = {}
    for part in _parts(pairs):
        scores = multihost.map_across_processes(scores_of)(part)
        scored |= zip(part, np.asarray(scores)[:, 0].tolist(), strict=True)
        bar.update(len(part))
    return scored


def _parts(pairs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        yield pairs[start : start + _PAIRS_AT_ONCE]


def _reranked(
    selection: Selection,
    query_set: QuerySet,
    found: SetResult,
    scored: dict[tuple[int, int], float],
    top: int,
) -> SetResult:
    """Return the result of a set after its runs are ordered by the scores of pairs."""
    runs = {}
    for pool, run in found.runs.items():
        scores, order = run.scores.copy(), np.tile(np.arange(run.rows.shape[1]), (len(run.qids), 1))
        for query, rows in enumerate(run.rows[:, :top].tolist()):
            kept = [row for row in rows if row >= 0]
            representatives = selection.representative[kept].tolist()
            new = np.array([scored[query, row] for row in representatives], np.float32)
            best = np.argsort(-new, kind="stable")
            order[query, : len(kept)] = best
            scores[query, : len(kept)] = new[best]
        runs[pool] = Run(
            run.qids,
            np.take_along_axis(run.dids, order, 1),
            scores,
            np.take_along_axis(run.rows, order, 1),
        )
    numbers = {qid: number for number, qid in enumerate(query_set.qids)}
    kept_queries = [numbers[qid] for qid in next(iter(runs.values())).qids]
    readable = replace(
        query_set,
        qids=tuple(query_set.qids[number] for number in kept_queries),
        relevant=tuple(query_set.relevant[number] for number in kept_queries),
    )
    rows_of = {pool: run.rows for pool, run in runs.items()}
    return replace(
        found, runs=runs, **rates(selection, readable, rows_of, found.wrong_modality.keys())
    )
