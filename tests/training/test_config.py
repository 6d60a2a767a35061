"""Settings that cannot be run are refused where they are made."""

import math
from pathlib import Path

import pytest

from puma_jax.errors import ConfigError
from puma_jax.training.config import (
    RESERVED,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    ScratchConfig,
    StageConfig,
    TrainConfig,
)

SCRATCH = ScratchConfig(
    vocab_size=400,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=48,
    vision_width=32,
    vision_layers=1,
    vision_heads=2,
)


def config(*names: str, **settings) -> TrainConfig:
    stages = {name: StageConfig(steps=1) for name in names or ("one",)}
    return TrainConfig(DataConfig(Path("data")), stages, scratch=SCRATCH, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossConfig(temperature=-1.0), r"loss\.temperature -1\.0 must be above 0"),
        (lambda: LossConfig(temperature=math.inf), r"loss\.temperature .* is not a finite number"),
        (
            lambda: LossConfig(exit_layers=(2, 4), exit_weights=(1.0,)),
            r"loss\.exit_weights \[1\.0\] must have one weight for each of",
        ),
        (lambda: LossConfig(widths=(0, 4)), r"loss\.widths\[0\] 0 must be"),
        (lambda: LossConfig(widths=(8, 4)), r"loss\.widths \[8, 4\] must be different numbers"),
        (lambda: LossConfig(chunk_size=0), r"loss\.chunk_size 0 must be"),
        (lambda: DistillConfig(weight=(math.nan, 0.1)), r"distill\.weight\[0\] .* finite number"),
        (
            lambda: DistillConfig(weight=(0.5, 1.5)),
            r"distill\.weight\[1\] 1\.5 must be in \[0, 1\]",
        ),
        (
            lambda: DistillConfig(target="similarities", items="candidates"),
            r'distill\.items "candidates" with distill\.target "similarities"',
        ),
        (lambda: OptimizerConfig(learning_rate=-1.0), r"optimizer\.learning_rate -1\.0 must be"),
        (lambda: OptimizerConfig(max_grad_norm=-1.0), r"optimizer\.max_grad_norm -1\.0 must be"),
        (lambda: OptimizerConfig(beta1=1.0), r"optimizer\.beta1 1\.0 must be in \[0, 1\)"),
        (lambda: OptimizerConfig(warmup_ratio=2.0), r"optimizer\.warmup_ratio 2\.0 must be in"),
        (lambda: StageConfig(), r"give one of them"),
        (lambda: StageConfig(steps=1, epochs=1.0), r"give one of them"),
        (lambda: StageConfig(steps=-1), r"stage\.steps -1 must be in"),
        (lambda: StageConfig(steps=2**31), r"stage\.steps 2147483648 must be in"),
        (lambda: StageConfig(epochs=math.nan), r"stage\.epochs NaN is not a finite number"),
        (lambda: StageConfig(steps=1, grad_cache_chunks=0), r"grad_cache_chunks 0 must be in"),
        (lambda: CheckpointConfig(every_steps=0), r"checkpoint\.every_steps 0 must be"),
        (lambda: CheckpointConfig(max_to_keep=0), r"checkpoint\.max_to_keep 0 must be"),
        (lambda: LogConfig(every_steps=0), r"log\.every_steps 0 must be"),
        (lambda: LogConfig(profile=(5, 2)), r"log\.profile \(5, 2\)"),
        (lambda: EvaluationConfig(max_queries=0), r"evaluation\.max_queries 0 must be"),
        (lambda: config(seed=10**30), r"seed 1000.* must be in"),
        (lambda: config(evaluation=EvaluationConfig(final_stages=("x",))), "final_stages names x"),
        (lambda: config("a", "A"), "stages a, A differ only in upper and lower case"),
        (lambda: config("a/b"), "stage 'a/b' must have a name of letters"),
        (lambda: config("a.b"), r"stage 'a\.b' must have a name of letters"),
        (lambda: config(""), "stage '' must have a name of letters"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["heads", "width", "vocab_size", "vision_layers", "kv_heads"])
def test_a_model_from_scratch_has_sizes(field):
    with pytest.raises(ConfigError, match=rf"scratch\.{field} 0 must be in"):
        ScratchConfig(**{**vars(SCRATCH), field: 0})


@pytest.mark.parametrize("name", [*sorted(RESERVED), "Base"])
def test_a_stage_takes_no_name_of_another_part_of_a_workdir(name):
    with pytest.raises(ConfigError, match=f"stage {name} has the name of another part"):
        config("first", name)


@pytest.mark.parametrize("length", [{"steps": 0}, {"epochs": 0.0}, {"steps": 0, "epochs": 0.0}])
def test_a_stage_of_no_steps_trains_nothing(length):
    assert not StageConfig(**length).trains
    assert StageConfig(**{**length, "epochs": 0.5}).trains
