"""PUMA's recipe for Qwen2-VL-2B, which has 28 layers as the 7B model has."""

from __future__ import annotations

from pathlib import Path

from puma_jax.train import load_config
from puma_jax.training.config import TrainConfig


def get_config(model: str = "Qwen/Qwen2-VL-2B-Instruct") -> TrainConfig:
    """Return the recipe.

    Args:
        model: Hugging Face folder or hub id to start from.
    """
    return load_config(Path(__file__).with_name("puma_qwen2vl_7b.py"))(model)
