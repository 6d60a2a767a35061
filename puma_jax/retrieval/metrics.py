"""Hit rates, and how far they could be off.

What M-BEIR calls Recall@k is a hit rate: a query scores 1 if any of its relevant documents is
among the first k, whatever their number. (The share of relevant documents that are found, "set
recall", gives other numbers.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from puma_jax.typing import Int, ndarray


def hit_rate(
    ranked: Int[ndarray, "queries depth"], relevant: Sequence[Collection[int]], k: int
) -> float:
    """Return the share of queries with a relevant document among their first k.

    A query without any relevant document counts as a miss, as do relevant documents that are in
    no pool and so can never be ranked.

    Args:
        ranked: Documents found for each query, best first; -1 stands for none.
        relevant: Documents that answer each query.
        k: How far to look, at most `depth`.
    """
    return float(np.mean(first_relevant(ranked, relevant) < k)) if len(ranked) else 0.0


def first_relevant(
    ranked: Int[ndarray, "queries depth"], relevant: Sequence[Collection[int]]
) -> Int[ndarray, "queries"]:
    """Return the rank, from 0, of each query's first relevant document; `depth` if there is none.

    One such array answers every k: the query is a hit where it is below k.
    """
    queries, depth = ranked.shape
    of_query = np.repeat(np.arange(queries), [len(rows) for rows in relevant])
    rows = np.fromiter((row for of_one in relevant for row in of_one), np.int64, len(of_query))
    # A query and a document in one number; rows start at -1.
    stride = max(ranked.max(initial=-1), rows.max(initial=-1)) + 2
    judged = of_query * stride + rows + 1
    found = np.arange(queries)[:, None] * stride + ranked + 1
    is_relevant = np.isin(found, judged[rows >= 0])
    return np.where(is_relevant.any(1), is_relevant.argmax(1) if depth else 0, depth)


def bootstrap_interval(
    rates: Sequence[float],
    queries: Sequence[int],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the plain mean of several sets' hit rates.

    Queries are drawn anew, with replacement, within each set. The hits among n such draws are a
    binomial count, so that is what is drawn. One set gives the interval of its own rate.

    Args:
        rates: Hit rate of each set.
        queries: Number of queries of each set.
        level: Share of the resampled means that lies within the interval.
        resamples: How many means to draw.
        seed: Of the draws.
    """
    counts = np.asarray(queries)
    hits = np.random.default_rng(seed).binomial(counts, rates, (resamples, len(counts)))
    low, high = np.quantile((hits / counts).mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
