"""Layer-pruned self-distillation: the cut model shall reach the states of the whole one."""

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
    """Mean squared error of states, over items and width (arXiv 2507.08064, section 3.2).

    States are those at [RET] after the final norm, **not** normalised. The paper adds the losses of
    queries and of candidates, at a weight of 0.05 in the released code. No gradient reaches the
    teacher.

    Args:
        student: States of the cut model.
        teacher: States of the whole model for the same items.
        valid: Which items count.
    """
    error = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    squared = jnp.mean(error**2, axis=-1)
    if valid is None:
        return jnp.mean(squared)
    return jnp.sum(jnp.where(valid, squared, 0.0)) / jnp.maximum(valid.sum(), 1)
