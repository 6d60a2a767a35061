"""The operations of training: forward, backward, recomputation, and the teacher."""

import pytest
from cost import training_flops

from puma_jax.training.config import DistillConfig, StageConfig


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({}, 3 * 10),
        ({"grad_cache_chunks": 2}, 4 * 10),
        ({"distill": DistillConfig(weight=(0.5, 0.1))}, 3 * 10 + 40),
        ({"distill": DistillConfig(cached=True)}, 3 * 10),
    ],
    ids=["plain", "recomputed", "taught", "without weight"],
)
def test_all_passes_are_counted(stage, expected):
    assert training_flops(10, 40, StageConfig(steps=1, **stage)) == expected
