"""One attention over packed rows; the kernels that compute it live behind its name.

Rows hold several items. An item is a run of equal segment ids, and attention never crosses from
one segment to another. Padding is a segment like any other (id 0), so that no row of the softmax
is ever empty.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from puma_jax.errors import AttentionError
from puma_jax.typing import Array, Bool, Float, Int


def attention(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    *,
    segments: Int[Array, "rows length"],
    causal: bool,
    implementation: str = "xla",
) -> Float[Array, "rows length heads dim"]:
    """Softmax attention, scaled by 1/√dim, inside each segment of each row.

    Args:
        q: Queries; `heads` is a multiple of `kv_heads` (grouped-query attention).
        k: Keys.
        v: Values.
        segments: Item of each position; positions with different ids do not see each other.
        causal: Whether a position sees only itself and what stands before it in the row.
        implementation: A name in `IMPLEMENTATIONS`.

    Returns:
        The attended values, in the dtype of `q`; the softmax is float32.

    Raises:
        AttentionError: The implementation is unknown or cannot run on this machine. It is never
            replaced by another one in silence.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise AttentionError(f'attention implementation "{implementation}" is not one of {known}')
    return IMPLEMENTATIONS[implementation](q, k, v, segments, causal)


def segment_mask(
    segments: Int[Array, "rows length"], causal: bool
) -> Bool[Array, "rows 1 length length"]:
    """True where a query position (third axis) may see a key position (fourth axis)."""
    mask = segments[:, :, None] == segments[:, None, :]
    if causal:
        length = segments.shape[1]
        mask &= jnp.tril(jnp.ones((length, length), bool))
    return mask[:, None]


def _xla(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    segments: Int[Array, "rows length"],
    causal: bool,
) -> Float[Array, "rows length heads dim"]:
    return jax.nn.dot_product_attention(
        q, k, v, mask=segment_mask(segments, causal), implementation="xla"
    )


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"xla": _xla}
