"""Attention by tokamax's Pallas kernels for NVIDIA GPUs, which skip what lies outside a segment."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

from puma_jax.typing import Array, Float, Int


def tokamax(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    segment_ids: Int[Array, "rows length"],
    *,
    causal: bool,
    kernel: str,
) -> Float[Array, "rows length heads dim"]:
    """Return `attention.attention` for rows on one device.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        segment_ids: Number of the item at each position.
        causal: Whether a position attends only to itself and earlier positions.
        kernel: One of tokamax's: "mosaic_gpu" for Hopper and Blackwell, "triton" for Ampere and
            later, "xla" for any machine.
    """
    from tokamax._src.ops.attention import api, base  # takes seconds; absent from other machines

    _hide_cache_misses()
    start, end = (bound[:, None] for bound in key_ranges(segment_ids))
    # No key after a causal position is read anyway: a further bound would only cost time.
    mask = base.Mask(k_start=start, k_end=None if causal else end, is_causal=causal)
    return api.IMPLEMENTATIONS[kernel](q, k, v, mask=mask)


def key_ranges(
    segment_ids: Int[Array, "rows length"],
) -> tuple[Int[Array, "rows length"], Int[Array, "rows length"]]:
    """Return the first key that each position attends to, and the key after the last.

    A segment is a run of equal ids. Padding is one too, so no range is empty, and the softmax of
    no row is 0 / 0.
    """
    length = segment_ids.shape[1]
    position = jnp.arange(length, dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(first, position, 0), axis=1)
    end = jax.lax.cummin(jnp.where(last, position + 1, length), axis=1, reverse=True)
    return start, end


@functools.cache
def _hide_cache_misses() -> None:
    """Hide the long line that tokamax logs for every shape it has no measured block sizes for."""
    absl = logging.getLogger("absl")
    absl.addFilter(lambda record: not str(record.msg).startswith("Autotuning cache miss"))
