"""Paired differences between two arms, and how sure they are.

The measure of a run is M-BEIR's: the hit rate of each set, and the plain mean of the sets. Two arms
are compared query by query with the same seeds. Two things vary by chance: the seed, which draws
the order of the data, and the queries, which are a sample. The variance of a mean difference over
n seeds is the sum of both:

    s² / n                       with s² the variance of the seeds' mean differences
    Σ_sets v_set / q_set / sets² with v_set the variance of a set's differences, averaged over seeds

and the interval is Student's t with the degrees of freedom of Welch and Satterthwaite. One seed
gives the second part alone, an interval that says nothing about other seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from puma_jax.evaluation.report import POOLS, Pool
from puma_jax.typing import Int, ndarray

NEVER = 2**31 - 1
"""The rank of a document that is not found."""

Hits = list[ndarray]
"""By set: 1.0 for each query that is a hit, 0.0 for others; or differences of two arms' hits."""


@dataclass(frozen=True)
class Interval:
    """A mean difference of hit rates and its confidence interval."""

    mean: float
    low: float
    high: float
    seeds: int

    def tells_apart(self, noise: float) -> bool:
        """Return whether the arms differ by more than chance and by more than rounding does.

        Args:
            noise: Difference that another order of rounding makes.
        """
        return not self.low <= 0 <= self.high and abs(self.mean) > noise


def paired_interval(
    ours: Sequence[Hits], theirs: Sequence[Hits], *, level: float = 0.95
) -> Interval:
    """Return the mean difference ours − theirs and its interval; see the module.

    Args:
        ours: Hits of one arm, by seed.
        theirs: Hits of the other, with the same seeds, sets and queries.
        level: Confidence of the interval.
    """
    seeds = len(ours)
    pairs = [
        [mine - other for mine, other in zip(one, another, strict=True)]
        for one, another in zip(ours, theirs, strict=True)
    ]
    per_seed = np.array([np.mean([of_set.mean() for of_set in sets]) for sets in pairs])
    averaged = [np.mean(of_set, axis=0) for of_set in zip(*pairs, strict=True)]
    of_queries = sum(one.var(ddof=1) / len(one) for one in averaged) / len(averaged) ** 2
    of_seeds = per_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    variance = of_seeds + of_queries
    queries = sum(len(one) - 1 for one in averaged)
    shares = of_queries**2 / queries + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0)
    freedom = variance**2 / shares if shares else np.inf
    half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(variance)
    mean = float(per_seed.mean())
    return Interval(mean, mean - half, mean + half, seeds)


def hits(ranks: Sequence[Int[ndarray, "queries"]], k: int) -> Hits:
    """Return the hits at k of each set, from the ranks of the first relevant documents."""
    return [(of_set < k).astype(float) for of_set in ranks]


def mean_rate(hits: Hits) -> float:
    """Return the plain mean of the sets' hit rates."""
    return float(np.mean([of_set.mean() for of_set in hits]))


def read_ranks(results: Path, qrels: Path, split: str) -> dict[str, Int[ndarray, "queries"]]:
    """Return the rank, from 0, of every query's first relevant document, in the order of qids.

    A query that finds none has the rank `NEVER`. The keys are set/pool.

    Args:
        results: Folder with the TREC run files of a stage.
        qrels: Folder with the judgments of the split.
        split: The split.
    """
    found = {}
    for path in sorted(results.glob(f"*_{split}_local_run.txt")):
        name = path.name.removesuffix("_local_run.txt")
        relevant: dict[str, set[str]] = {}
        for line in (qrels / f"{name}_qrels.txt").read_text("utf-8").splitlines():
            qid, _, did, score, *_ = line.split()
            if float(score) > 0:
                relevant.setdefault(qid, set()).add(did)
        for pool in POOLS:
            first = _first_relevant(results / f"{name}_{pool}_run.txt", relevant)
            found[f"{name}/{pool}"] = np.array([first[qid] for qid in sorted(relevant)])
    return found


def of_pool(ranks: dict[str, Int[ndarray, "queries"]], pool: Pool) -> list[ndarray]:
    """Return the ranks of each set in one pool, in the order of the sets' names."""
    return [ranks[key] for key in sorted(ranks) if key.endswith(f"/{pool}")]


def _first_relevant(run: Path, relevant: dict[str, set[str]]) -> dict[str, int]:
    """Return the rank of each query's first relevant document in a run file, from 0."""
    first = dict.fromkeys(relevant, NEVER)
    with run.open(encoding="utf-8") as lines:
        for line in lines:
            qid, _, did, rank, *_ = line.split()
            if did in relevant.get(qid, ()):
                first[qid] = min(first[qid], int(rank) - 1)
    return first
