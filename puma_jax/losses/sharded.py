"""The same loss in less memory: some queries at a time, and each device its own queries.

The matrix of all scores grows with the square of the batch. In chunks of queries, whose scores the
backward pass computes again, only one chunk's scores are held at a time. Devices see each other's
candidates all at once, or one device's after the other's in a ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
        total = _sum(queries, positives, candidates, rule, layout.chunk_size)
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
            total = _sum(queries, positives, candidates, rule, chunk_size)
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


def sum_in_chunks(
    losses: Callable[[Any], Float[Array, "r"]], rows: Any, chunk_size: int | None
) -> Float[Array, ""]:
    """Return the sum of the losses of queries, some of them at a time.

    Args:
        losses: Returns the loss of each query, from the rows of some of them.
        rows: Arrays whose first axis is the queries; the first of them holds numbers.
        chunk_size: Queries at a time; None takes all.

    Raises:
        ConfigError: The queries do not divide into chunks.
    """
    first = jax.tree.leaves(rows)[0]
    n = len(first)
    if chunk_size is None or chunk_size >= n:
        return losses(rows).sum()
    if n % chunk_size:
        raise ConfigError(
            f"{n} queries of a device do not divide into chunks of {chunk_size} queries: "
            "change loss.chunk_size"
        )

    @jax.checkpoint
    def add(total: Array, chunk: Any) -> tuple[Array, None]:
        return total + losses(chunk).sum(), None

    chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk_size, *leaf.shape[1:]), rows)
    # The sum starts as a value that varies over devices as what is added to it does.
    start = first.reshape(-1)[0].astype(jnp.float32) * 0
    total, _ = jax.lax.scan(add, start, chunks)
    return total


def _sum(
    queries: Array,
    positives: Candidates,
    candidates: Candidates,
    rule: LogitRule,
    chunk_size: int | None,
) -> Float[Array, ""]:
    """Return the sum of `cross_entropy` over queries, some of them at a time."""
    return sum_in_chunks(
        lambda rows: cross_entropy(rows[0], rows[1], candidates, rule),
        (queries, positives),
        chunk_size,
    )
