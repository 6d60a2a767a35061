"""Dropout that does not depend on where an item is packed.

A token draws its masks from a key of its own, made of what it is: the number of its item in the
batch and its place in the item. Neither neighbours, nor rows, chunks and devices change a mask.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from puma_jax.rows import Rows
from puma_jax.typing import Array, Float, Int, PRNGKeyArray

# One typed key for each token: [rows, length].
TokenKeys = Array


def token_keys(
    key: PRNGKeyArray, rows: Rows, items: Int[Array, "slots"], *, groups: int = 1
) -> TokenKeys:
    """Return a key for every token: of `key`, its item, and its distance to the item's [RET].

    Args:
        key: From which all is drawn. It must be of jax's default kind, "threefry2x32": under
            `jax.vmap` the others draw for a whole batch from its first key.
        rows: The packed items. Their padding gets keys that mean nothing.
        items: Number of the item in each slot, in an order that packing does not change; −1 in
            unused slots.
        groups: Into how many parts the leading axes of `rows` divide.
    """
    segments, columns = rows.segments, jnp.arange(rows.segments.shape[1])
    # An item is a run of equal segments: it ends at the next column that is followed by another.
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(ends, columns, columns[-1]), axis=1, reverse=True)

    def at_ret(ret: Int[Array, "slots"], items: Int[Array, "slots"]) -> Int[Array, "tokens"]:
        # Unused slots point at token 0. Their −1 does not displace an item that ends there.
        return jnp.full(segments.size // groups, -1).at[ret].max(items)

    numbers = jax.vmap(at_ret)(rows.ret.reshape(groups, -1), items.reshape(groups, -1))
    number = jnp.take_along_axis(numbers.reshape(segments.shape), end, axis=1)
    return fold_in(fold_in(key, number), end - columns)


def fold_in(keys: Array, numbers: Array | int) -> Array:
    """Return keys for parts with these numbers; keys and numbers broadcast."""
    return jnp.vectorize(jax.random.fold_in)(keys, numbers)


def drop(x: Float[Array, "*tokens width"], keys: TokenKeys, rate: float) -> Array:
    """Return `x` with this share of its values at zero, the others scaled to keep the mean."""
    draw = functools.partial(jax.random.bernoulli, p=1 - rate, shape=x.shape[-1:])
    kept = jnp.vectorize(draw, signature="()->(width)")(keys)
    return jnp.where(kept, x / (1 - rate), 0)
