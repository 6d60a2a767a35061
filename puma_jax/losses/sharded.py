"""The same loss in less memory: some rows at a time, and each device its own rows.

The matrix of all scores grows with the square of the batch. In chunks of rows, whose scores the
backward pass computes again, no more than one chunk's is ever held. Devices see each other's keys
all at once, or one after the other in a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from puma_jax.errors import ConfigError
from puma_jax.losses.ring import ring_losses
from puma_jax.losses.softmax import Keys, Rule, row_losses
from puma_jax.typing import Array, Float


@dataclass(frozen=True)
class Layout:
    """How the scores of a batch are spread over memory and devices."""

    rows: int | None = None
    """Queries whose scores are held at a time, on each device, and in a ring the most keys they
    are compared with at a time; None holds all."""
    mesh: Mesh | None = None
    """Devices; None computes as if there were one."""
    axes: tuple[str, ...] = ("data",)
    """Axes of the mesh that queries, candidates and negatives are sharded over."""
    over_devices: Literal["gather", "ring"] = "gather"
    """Every device holds the keys of all, or those of one at a time as they go round."""


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
        total = _summed(queries, candidates, _joined(candidates, negatives), rule, layout.rows)
        return total / jnp.maximum(candidates.labels.valid.sum(), 1)

    axes = layout.axes
    split = PartitionSpec(axes)

    def local(queries: Array, candidates: Keys, negatives: Keys | None, rule: Rule) -> Array:
        keys = _joined(candidates, negatives)
        if layout.over_devices == "ring":
            total = ring_losses(queries, candidates, keys, rule, axes=axes, tile=layout.rows).sum()
        else:
            keys = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), keys)
            total = _summed(queries, candidates, keys, rule, layout.rows)
        valid = jax.lax.psum(candidates.labels.valid.sum(), axes)
        return jax.lax.psum(total, axes) / jnp.maximum(valid, 1)

    over_devices = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(split, split, split, PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    return over_devices(queries, candidates, negatives, rule)


def _joined(candidates: Keys, negatives: Keys | None) -> Keys:
    if negatives is None:
        return candidates
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), candidates, negatives)


def _summed(
    queries: Array, positives: Keys, keys: Keys, rule: Rule, rows: int | None
) -> Float[Array, ""]:
    n = len(queries)
    if rows is None or rows >= n:
        return row_losses(queries, positives, keys, rule).sum()
    if n % rows:
        raise ConfigError(f"{n} queries of a device do not divide into chunks of {rows} rows")

    @jax.checkpoint
    def chunk(total: Array, of_rows: tuple[Array, Keys]) -> tuple[Array, None]:
        return total + row_losses(*of_rows, keys, rule).sum(), None

    chunks = jax.tree.map(
        lambda leaf: leaf.reshape(-1, rows, *leaf.shape[1:]), (queries, positives)
    )
    # The sum starts as a value that varies over devices as what is added to it does.
    start = queries[0, 0].astype(jnp.float32) * 0
    total, _ = jax.lax.scan(chunk, start, chunks)
    return total
