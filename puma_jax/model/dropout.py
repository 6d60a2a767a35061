"""Dropout that does not depend on where an item is packed.

Each token draws its masks from a key of its own, made from the number of its item in the batch and
its place in the item. Neighbors, rows, chunks and devices do not change a mask.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from puma_jax.rows import PackedBatch
from puma_jax.typing import Array, Float, Int, PRNGKeyArray

# One typed key for each token: [rows, length].
TokenKeys = Array


def token_keys(
    key: PRNGKeyArray, rows: PackedBatch, items: Int[Array, "slots"], *, data_shards: int = 1
) -> TokenKeys:
    """Return a key for every token, from `key`, its item and its distance to the item's end.

    Args:
        key: Random key to derive from. It must be of jax's default kind, "threefry2x32": under
            `jax.vmap` the other kinds draw for a whole batch from its first key.
        rows: The packed items. Padding gets keys that nothing depends on.
        items: Number of the item in each slot, independent of packing; −1 in unused slots.
        data_shards: Number of parts that the leading axes of `rows` divide into.
    """
    segments, columns = rows.segment_ids, jnp.arange(rows.segment_ids.shape[1])
    # An item is a run of equal segments: it ends at the next column that is followed by another.
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(ends, columns, columns[-1]), axis=1, reverse=True)

    def at_pool_index(
        index: Int[Array, "slots"], items: Int[Array, "slots"]
    ) -> Int[Array, "tokens"]:
        # Unused slots point at token 0. Their −1 does not displace an item that ends there.
        return jnp.full(segments.size // data_shards, -1).at[index].max(items)

    numbers = jax.vmap(at_pool_index)(
        rows.pool_index.reshape(data_shards, -1), items.reshape(data_shards, -1)
    )
    number = jnp.take_along_axis(numbers.reshape(segments.shape), end, axis=1)
    return fold_in(fold_in(key, number), end - columns)


def fold_in(keys: Array, numbers: Array | int) -> Array:
    """Return one key for each pair of a key and a number; the two broadcast."""
    return jnp.vectorize(jax.random.fold_in)(keys, numbers)


def dropout(x: Float[Array, "*tokens width"], keys: TokenKeys, rate: float) -> Array:
    """Return `x` with a share `rate` of its values at zero, the others divided by 1 − rate."""
    draw = functools.partial(jax.random.bernoulli, p=1 - rate, shape=x.shape[-1:])
    kept = jnp.vectorize(draw, signature="()->(width)")(keys)
    return jnp.where(kept, x / (1 - rate), 0)
