"""Matryoshka representation learning: one loss at several widths of the same vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from puma_jax.typing import Array, Float

Loss = Callable[..., Array]
"""A loss of several arrays of unit vectors."""


def matryoshka(
    loss: Loss,
    vectors: Sequence[Float[Array, "_ d"]],
    widths: Sequence[int],
    weights: Sequence[float] = (),
) -> tuple[Float[Array, ""], dict[int, Float[Array, ""]]]:
    """Return the sum of a loss over widths, and its value at each narrower width.

    With L(x) the loss of unit vectors x, the sum is L(x) + Σ_w c_w · L(x_w / |x_w|), x_w being the
    first w values of x (Kusupati et al. 2022, arXiv 2205.13147, where all weights c_w are 1).

    Args:
        loss: Loss of arrays of unit vectors, at any width.
        vectors: Its arguments, at the whole width.
        widths: Narrower widths.
        weights: Weight of each of them; none are all 1.
    """
    narrow = {width: loss(*(prefix(of, width) for of in vectors)) for width in widths}
    weighted = zip(weights or [1.0] * len(widths), narrow.values(), strict=True)
    return sum((weight * value for weight, value in weighted), start=loss(*vectors)), narrow


def prefix(vectors: Float[Array, "n d"], width: int) -> Float[Array, "n {width}"]:
    """Return the first values of each vector, scaled to length 1. A zero prefix stays zero."""
    first = vectors[:, :width].astype(jnp.float32)
    squared = jnp.sum(first**2, axis=1, keepdims=True)
    # A square root has no finite slope at 0.
    length = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
    return first / length
