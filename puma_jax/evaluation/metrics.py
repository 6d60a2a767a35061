"""Hit rates and their confidence intervals.

The hit rate at k is the fraction of queries with a relevant document among the first k. M-BEIR
calls it Recall@k; it is not set recall, the fraction of relevant documents that are found.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from puma_jax.typing import Int, ndarray


def first_relevant(
    ranked: Int[ndarray, "queries depth"], relevant: Sequence[Collection[int]]
) -> Int[ndarray, "queries"]:
    """Return the rank, from 0, of each query's first relevant document; `depth` if there is none.

    A query is a hit at k where this rank is below k. A query without relevant documents is a miss,
    and relevant documents in no pool are never found.

    Args:
        ranked: Documents found for each query, best first; -1 for none.
        relevant: Documents relevant to each query.
    """
    queries, depth = ranked.shape
    of_query = np.repeat(np.arange(queries), [len(rows) for rows in relevant])
    rows = np.fromiter((row for of_one in relevant for row in of_one), np.int64, len(of_query))
    # Each pair of query and document is one number; rows start at -1.
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

    Queries are resampled with replacement within each set. The hits among n resampled queries are
    binomially distributed, so they are drawn from that. One set gives the interval of its rate.

    Args:
        rates: Hit rate of each set.
        queries: Number of queries of each set.
        level: Fraction of the resampled means inside the interval.
        resamples: Number of means to draw.
        seed: Seed of the draws.
    """
    counts = np.asarray(queries)
    hits = np.random.default_rng(seed).binomial(counts, rates, (resamples, len(counts)))
    low, high = np.quantile((hits / counts).mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
