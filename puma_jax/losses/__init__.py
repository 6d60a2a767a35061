"""Contrastive losses with modality masks, and distillation: pure functions of vectors."""

from puma_jax.losses.contrastive import (
    Negatives,
    hard_temperature,
    info_nce,
    learnable_temperature,
    mac_loss,
    mamcl_loss,
)
from puma_jax.losses.distillation import distill_loss
from puma_jax.losses.sharded import DENSE, Layout

__all__ = [
    "DENSE",
    "Layout",
    "Negatives",
    "distill_loss",
    "hard_temperature",
    "info_nce",
    "learnable_temperature",
    "mac_loss",
    "mamcl_loss",
]
