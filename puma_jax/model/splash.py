"""Splash attention: jax's Pallas kernel for TPUs, which never holds a whole matrix of scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from puma_jax.model.attention import TILE
from puma_jax.typing import Array, Float, Int

# The kernel holds block × block scores at a time. Small blocks skip more of what a causal mask
# hides, large ones have less to pay for each; 896 still fits where a length has no other divisor.
_LARGEST_BLOCK = 896


def splash(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    segments: Int[Array, "rows length"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "rows length heads dim"]:
    """Return `attention.attention` of rows that one device holds.

    Args:
        q: Queries; `length` is a multiple of 128.
        k: Keys.
        v: Values.
        segments: Item of each position.
        causal: Whether a position sees only itself and what stands before it.
        interpret: Compute what the kernel would, operation by operation, on any machine.
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
    out = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(segments, segments))
    return jnp.swapaxes(out, 1, 2)
