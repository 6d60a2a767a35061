"""Distillation of similarities: the pruned model ranks a batch as the whole one does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from puma_jax.losses.sharded import DENSE, Layout, sum_in_chunks
from puma_jax.losses.softmax import Temperature
from puma_jax.typing import Array, Bool, Float

Vectors = tuple[Float[Array, "n d"], Float[Array, "n d"]]
"""Unit vectors of the student and of the teacher, whose widths are equal here."""


def similarity_distill_loss(
    queries: Vectors,
    candidates: Vectors,
    *,
    temperature: Temperature,
    valid: Bool[Array, "n"] | None = None,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """Return how far the student's ranking of the batch is from the teacher's.

    With s_ij and t_ij the cosines of query i and candidate j of the student and of the teacher,
    p_i = softmax_j(t_ij / temperature) and q_i = softmax_j(s_ij / temperature), it is the mean over
    the valid queries of the Kullback-Leibler divergence

        Σ_j p_ij (log p_ij − log q_ij),

    over the valid candidates of the global batch: SEED (arXiv 2101.04731) with the batch in place
    of its queue. It is 0 where both rank alike. No gradient reaches the teacher.

    Args:
        queries: Unit vectors of the queries, of the student and of the teacher.
        candidates: Those of the candidates, pair by pair.
        temperature: Temperature that divides both models' cosines.
        valid: Which pairs count; None counts all.
        layout: How the work is spread; candidates are always gathered.

    Raises:
        ConfigError: The queries do not divide into the devices' chunks.
    """
    counts = jnp.ones(len(queries[0]), bool) if valid is None else valid
    student, teacher = queries
    of_pairs = ((student, jax.lax.stop_gradient(teacher)), counts)
    pool = ((candidates[0], jax.lax.stop_gradient(candidates[1])), counts)
    if layout.mesh is None:
        total = _sum(of_pairs, pool, temperature, layout.chunk_size)
        return total / jnp.maximum(counts.sum(), 1)

    axes, split = layout.axes, PartitionSpec(layout.axes)

    def local(
        of_pairs: tuple[Vectors, Array], pool: tuple[Vectors, Array], temperature: Temperature
    ) -> Array:
        of_all = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), pool)
        total = _sum(of_pairs, of_all, temperature, layout.chunk_size)
        valid = jax.lax.psum(of_pairs[1].sum(), axes)
        return jax.lax.psum(total, axes) / jnp.maximum(valid, 1)

    sharded = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(split, split, PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    return sharded(of_pairs, pool, jnp.asarray(temperature))


def _sum(
    of_pairs: tuple[Vectors, Bool[Array, "n"]],
    pool: tuple[tuple[Float[Array, "m d"], Float[Array, "m d"]], Bool[Array, "m"]],
    temperature: Temperature,
    chunk_size: int | None,
) -> Float[Array, ""]:
    """Return the sum of the divergences of all queries, some of them at a time."""
    vectors, counts = pool

    def divergences(rows: tuple[Vectors, Array]) -> Float[Array, "r"]:
        queries, valid = rows
        found, wanted = (
            _log_softmax(of_queries, of_pool, counts, temperature)
            for of_queries, of_pool in zip(queries, vectors, strict=True)
        )
        terms = jnp.where(counts, jnp.exp(wanted) * (wanted - found), 0.0)
        return jnp.where(valid, terms.sum(axis=1), 0.0)

    return sum_in_chunks(divergences, of_pairs, chunk_size)


def _log_softmax(
    queries: Float[Array, "r d"],
    candidates: Float[Array, "m d"],
    counts: Bool[Array, "m"],
    temperature: Temperature,
) -> Float[Array, "r m"]:
    """Return the logarithm of each query's softmax over the candidates that count."""
    scores = jnp.matmul(
        queries.astype(jnp.float32),
        candidates.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    # Infinity would turn the gradient of a query without candidates into NaN.
    return jax.nn.log_softmax(jnp.where(counts, scores / temperature, jnp.finfo(jnp.float32).min))
