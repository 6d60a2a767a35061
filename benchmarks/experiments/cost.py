"""Floating-point operations of training, counted by formula.

A backward pass costs twice its forward pass where all weights are trained. The loss and the
optimizer are left out.
"""

from __future__ import annotations

from puma_jax.training.config import StageConfig

_BACKWARD = 2
"""Cost of a backward pass in forward passes."""


def training_flops(student: float, teacher: float, stage: StageConfig) -> float:
    """Return the operations of training on items whose forward passes cost this much.

    Args:
        student: Operations of the student's forward passes, over the items of all steps.
        teacher: Operations of the teacher's forward passes, over the same items, or over those
            whose states it computes before training.
        stage: The stage, which trains all weights.
    """
    passes = 1 + _BACKWARD + (stage.grad_cache_chunks > 1)
    return passes * student + stage.distill.on * teacher
