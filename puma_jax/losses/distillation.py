"""Layer-pruned self-distillation: the pruned model learns the states of the whole model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puma_jax.typing import Array, Bool, Float


def distill_loss(
    student: Float[Array, "n d"],
    teacher: Float[Array, "n d"],
    *,
    valid: Bool[Array, "n"] | None = None,
) -> Float[Array, ""]:
    """Return the mean squared error over items and width (arXiv 2507.08064, section 3.2).

    The states are those at [RET] after the final norm, **not** normalized to unit length. The paper
    adds the losses of queries and of candidates, with a weight of 0.05 in the released code. No
    gradient reaches the teacher.

    Args:
        student: States of the pruned model.
        teacher: States of the whole model for the same items.
        valid: Which items count; None counts all.
    """
    error = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    squared = jnp.mean(error**2, axis=-1)
    if valid is None:
        return jnp.mean(squared)
    return jnp.sum(jnp.where(valid, squared, 0.0)) / jnp.maximum(valid.sum(), 1)
