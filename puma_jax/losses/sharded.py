"""The same loss in less memory: some queries at a time, and each device its own queries.

The matrix of all scores grows with the square of the batch. In chunks of queries, whose scores the
backward pass computes again, only one chunk's scores are held at a time. Devices see each other's
candidates all at once, or one device's after the other's in a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from puma_jax.axes import DATA_AXIS
from puma_jax.errors import ConfigError
from puma_jax.losses.ring import ring_cross_entropy
from puma_jax.losses.softmax import Candidates, LogitRule, cross_entropy
from puma_jax.typing import Array, Float


@dataclass(frozen=True)
class Layout:
    """How the scores of a batch are spread over memory and devices."""

    chunk_size: int | None = None
    """Queries whose scores each device holds at a time; in a ring also the most candidates that
    they are compared with at a time. None holds all."""
    mesh: Mesh | None = None
    """Mesh of the devices; None computes on one."""
    axes: tuple[str, ...] = (DATA_AXIS,)
    """Axes of the mesh that queries, candidates and negatives are sharded over."""
    cross_device: Literal["gather", "ring"] = "gather"
    """"gather": every device holds the candidates of all devices. "ring": every device holds those
    of one device at a time."""


DENSE = Layout()


def mean_cross_entropy(
    queries: Float[Array, "n d"],
    positives: Candidates,
    negatives: Candidates | None,
    rule: LogitRule,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """Return the mean of `softmax.cross_entropy` over all valid pairs of the global batch.

    Args:
        queries: Unit vectors.
        positives: The positive of each query, in the same order.
        negatives: Candidates that are no query's positive.
        rule: How scores become logits, and which candidates count.
        layout: How the work is spread; the result does not depend on it.

    Raises:
        ConfigError: The queries do not divide into the devices' chunks.
    """
    if layout.mesh is None:
        candidates = _concatenated(positives, negatives)
        total = _sum_in_chunks(queries, positives, candidates, rule, layout.chunk_size)
        return total / jnp.maximum(positives.metadata.valid.sum(), 1)

    axes, chunk_size = layout.axes, layout.chunk_size
    split = PartitionSpec(axes)

    def local(
        queries: Array, positives: Candidates, negatives: Candidates | None, rule: LogitRule
    ) -> Array:
        candidates = _concatenated(positives, negatives)
        if layout.cross_device == "ring":
            total = ring_cross_entropy(
                queries, positives, candidates, rule, axes=axes, tile=chunk_size
            ).sum()
        else:
            candidates = jax.tree.map(
                lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), candidates
            )
            total = _sum_in_chunks(queries, positives, candidates, rule, chunk_size)
        valid = jax.lax.psum(positives.metadata.valid.sum(), axes)
        return jax.lax.psum(total, axes) / jnp.maximum(valid, 1)

    sharded = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(split, split, split, PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    return sharded(queries, positives, negatives, rule)


def _concatenated(positives: Candidates, negatives: Candidates | None) -> Candidates:
    if negatives is None:
        return positives
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), positives, negatives)


def _sum_in_chunks(
    queries: Array,
    positives: Candidates,
    candidates: Candidates,
    rule: LogitRule,
    chunk_size: int | None,
) -> Float[Array, ""]:
    """Return the sum of `cross_entropy` over queries, some of them at a time."""
    n = len(queries)
    if chunk_size is None or chunk_size >= n:
        return cross_entropy(queries, positives, candidates, rule).sum()
    if n % chunk_size:
        raise ConfigError(
            f"{n} queries of a device do not divide into chunks of {chunk_size} queries: "
            "change loss.chunk_size"
        )

    @jax.checkpoint
    def add(total: Array, chunk: tuple[Array, Candidates]) -> tuple[Array, None]:
        return total + cross_entropy(*chunk, candidates, rule).sum(), None

    chunks = jax.tree.map(
        lambda leaf: leaf.reshape(-1, chunk_size, *leaf.shape[1:]), (queries, positives)
    )
    # The sum starts as a value that varies over devices as what is added to it does.
    start = queries[0, 0].astype(jnp.float32) * 0
    total, _ = jax.lax.scan(add, start, chunks)
    return total
