"""The same loss in less memory: some rows at a time, and each device its own rows.

The matrix of all scores grows with the square of the batch. In chunks of rows, whose scores the
backward pass computes again, no more than one chunk's is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from puma_jax.errors import ConfigError
from puma_jax.losses.softmax import Keys, Rule, row_losses
from puma_jax.typing import Array, Float


@dataclass(frozen=True)
class Layout:
    """How the scores of a batch are spread over memory and devices."""

    rows: int | None = None
    """Queries whose scores are held at a time, on each device; None holds all."""
    mesh: Mesh | None = None
    """Devices; None computes as if there were one."""
    axes: tuple[str, ...] = ("data",)
    """Axes of the mesh that queries, candidates and negatives are sharded over."""


DENSE = Layout()


def mean_loss(
    queries: Float[Array, "n d"],
    candidates: Keys,
    negatives: Keys | None,
    rule: Rule,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """Return the mean of `row_losses` over all valid pairs of the global batch.

    Args:
        queries: Unit vectors.
        candidates: The positive of each query, in the same order.
        negatives: Keys that are no query's positive.
        rule: How scores become logits.
        layout: How the work is spread; the result does not depend on it.

    Raises:
        ConfigError: The queries do not divide into the devices' chunks of rows.
    """
    if layout.mesh is None:
        total = _summed(
            queries, jnp.arange(len(queries)), _joined(candidates, negatives), rule, layout
        )
        return total / jnp.maximum(candidates.valid.sum(), 1)

    mesh, axes = layout.mesh, layout.axes
    split = PartitionSpec(axes)

    def local(queries: Array, candidates: Keys, negatives: Keys | None, rule: Rule) -> Array:
        first = jax.lax.axis_index(axes) * len(queries)
        everyone = jax.tree.map(
            lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), (candidates, negatives)
        )
        positive = first + jnp.arange(len(queries))
        total = _summed(queries, positive, _joined(*everyone), rule, layout)
        valid = jax.lax.psum(candidates.valid.sum(), axes)
        return jax.lax.psum(total, axes) / jnp.maximum(valid, 1)

    over_devices = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, split, PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    return over_devices(queries, candidates, negatives, rule)


def _joined(candidates: Keys, negatives: Keys | None) -> Keys:
    if negatives is None:
        return candidates
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), candidates, negatives)


def _summed(
    queries: Array, positive: Array, keys: Keys, rule: Rule, layout: Layout
) -> Float[Array, ""]:
    n, rows = len(queries), layout.rows
    if rows is None or rows >= n:
        return row_losses(queries, positive, keys, rule).sum()
    if n % rows:
        raise ConfigError(f"{n} queries of a device do not divide into chunks of {rows} rows")

    @jax.checkpoint
    def chunk(total: Array, of_rows: tuple[Array, Array]) -> tuple[Array, None]:
        return total + row_losses(*of_rows, keys, rule).sum(), None

    chunks = queries.reshape(-1, rows, queries.shape[1]), positive.reshape(-1, rows)
    # The sum starts as a value that varies over devices as what is added to it does.
    start = queries[0, 0].astype(jnp.float32) * 0
    total, _ = jax.lax.scan(chunk, start, chunks)
    return total
