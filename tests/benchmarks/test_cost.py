"""Operations of training are those of its forward and backward passes."""

import pytest
from cost import training_flops

from puma_jax.training.config import DistillConfig, StageConfig


def test_training_counts_the_teacher_and_the_second_pass_of_a_gradient_cache():
    plain = StageConfig(steps=1)
    assert training_flops(10.0, 40.0, plain) == 30
    assert training_flops(10.0, 40.0, StageConfig(steps=1, grad_cache_chunks=2)) == 40
    taught = StageConfig(steps=1, distill=DistillConfig(weight=(0.5, 0.1)))
    assert training_flops(10.0, 40.0, taught) == 70
    cached = StageConfig(steps=1, distill=DistillConfig(weight=(0.5, 0.1), cached=True))
    assert training_flops(10.0, 40.0, cached) == pytest.approx(30)
