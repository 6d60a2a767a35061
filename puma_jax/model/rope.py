"""Rotary position embeddings: the angles, and the rotation by them.

M-RoPE (arXiv 2409.12191, section 2.1) gives every token three positions: time, height, width. For
text the three are equal and the whole is plain RoPE. The ids come from `data.positions`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from puma_jax.typing import Array, Float, Int, ndarray


def axial_angles(
    positions: Int[Array, "rows length 2"], head_dim: int, base: float
) -> Float[Array, "rows length half"]:
    """Return the angles of the vision tower: half of the frequencies follow rows, half columns."""
    frequencies = _frequencies(head_dim // 2, base)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*positions.shape[:-1], -1)


def mrope_angles(
    positions: Int[Array, "rows length 3"],
    head_dim: int,
    base: float,
    section: tuple[int, int, int],
    interleaved: bool = False,
) -> Float[Array, "rows length half"]:
    """Return the angles of the decoder.

    Args:
        positions: Time, height and width position of each token.
        head_dim: Size of one head.
        base: Base of the frequencies.
        section: How many frequencies follow time, height and width.
        interleaved: Whether the three take turns (time, height, width, time, ...) until height and
            width have theirs; otherwise each has a section of its own, in this order.
    """
    axis = np.repeat(np.arange(3), section)
    if interleaved:
        axis = np.zeros(head_dim // 2, int)
        for number in (1, 2):
            axis[number : 3 * section[number] : 3] = number
    return positions[..., axis].astype(jnp.float32) * _frequencies(head_dim, base)


def rotate(
    x: Float[Array, "rows length heads dim"], angles: Float[Array, "rows length half"]
) -> Float[Array, "rows length heads dim"]:
    """Return `x` with the pairs (x_i, x_{i + dim/2}) of every head rotated, in float32 inside."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)


def _frequencies(dim: int, base: float) -> ndarray:
    # Rounded to float32 where the reference rounds: at positions in the hundreds a float64 table
    # would differ. The power itself is exact: NumPy's of float32 differs from CPU to CPU.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = (np.float64(base) ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers
