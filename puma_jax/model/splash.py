"""Splash attention: jax's Pallas kernel for TPUs, which never holds the whole score matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from puma_jax.axes import TILE
from puma_jax.typing import Array, Float, Int

# The kernel holds block × block scores at a time. Small blocks skip more of what a causal mask
# hides, large blocks have less overhead; 896 still fits in memory where no other size divides.
_LARGEST_BLOCK = 896


def splash(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    segment_ids: Int[Array, "rows length"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "rows length heads dim"]:
    """Return `attention.attention` for rows on one device.

    Args:
        q: Queries; `length` is a multiple of `TILE`.
        k: Keys.
        v: Values.
        segment_ids: Number of the item at each position.
        causal: Whether a position attends only to itself and earlier positions.
        interpret: Whether to run the kernel in Pallas interpret mode, on any machine.
    """
    _, length, heads, dim = q.shape
    shape = (length, length)
    mask = splash_attention.CausalMask(shape) if causal else splash_attention.FullMask(shape)
    blocks = range(min(length, _LARGEST_BLOCK), 0, -TILE)
    block = next(size for size in blocks if length % size == 0)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    # The kernel does not scale. In bfloat16 the factor itself would be rounded.
    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(segment_ids, segment_ids))
    return jnp.swapaxes(out, 1, 2)
