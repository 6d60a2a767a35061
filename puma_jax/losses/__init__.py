"""Contrastive losses with modality masks, and distillation: pure functions of vectors."""

from puma_jax.losses.contrastive import (
    Negatives,
    hard_temperature,
    info_nce,
    learnable_temperature,
    mac_loss,
    mamcl_loss,
)
from puma_jax.losses.distillation import distill_loss, score_distill_loss
from puma_jax.losses.matryoshka import matryoshka
from puma_jax.losses.sharded import DENSE, Layout
from puma_jax.losses.similarity import similarity_distill_loss
from puma_jax.losses.softmax import Temperature

__all__ = [
    "DENSE",
    "Layout",
    "Negatives",
    "Temperature",
    "distill_loss",
    "hard_temperature",
    "info_nce",
    "learnable_temperature",
    "mac_loss",
    "mamcl_loss",
    "matryoshka",
    "score_distill_loss",
    "similarity_distill_loss",
]
