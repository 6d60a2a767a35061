"""What an experiment is: a start, arms that all continue from it, and questions.

An arm is one stage of a training run (`StageConfig`). All arms of an experiment start from the same
model and read the same data in the same order, for each seed; they differ in what their names say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puma_jax.config import ComputeConfig, ImageConfig, PlanConfig, PromptConfig
from puma_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    ScratchConfig,
    StageConfig,
    TrainConfig,
)

SCRATCH = ScratchConfig(
    vocab_size=4096,
    width=128,
    layers=4,
    heads=4,
    kv_heads=2,
    mlp_width=384,
    vision_width=64,
    vision_layers=2,
    vision_heads=2,
)
STEPS = 60
"""Steps of an arm, unless its name says otherwise."""


@dataclass(frozen=True)
class Arm:
    """One way to continue from the start of an experiment."""

    name: str
    label: str
    """The name of the arm in tables and plots."""
    stage: StageConfig
    every_seed: bool = True
    """Whether it runs with every seed, or with the first one alone."""
    family: str = ""
    """Arms of one family differ in a setting that is tuned: the one that is best on the validation
    split at the first seed represents the family, and runs with every seed. Empty is no family."""
    forgets: Literal["nothing", "layers", "all"] = "nothing"
    """The weights that the arm does not take from the start of the experiment: "layers" draws those
    of the decoder's layers at random again, "all" starts from a model without any training."""
    continues: str = ""
    """An arm before this one, from whose model of the same seed this one starts; empty is the start
    of the experiment."""
    averages: int = 0
    """Last checkpoints of the arm that it continues, from whose mean it starts; 0 takes its model.
    That arm has to keep them."""
    negatives: Literal["none", "mined", "scored"] = "none"
    """Hard negatives of its data: those that the start of the experiment mined, and also scored."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the run's config that it sets, beside its stage."""


@dataclass(frozen=True)
class Question:
    """A comparison of two arms, or of the best arms of two families."""

    arm: str
    other: str
    text: str


@dataclass(frozen=True)
class Base:
    """A model that experiments start from, and the stages that train it."""

    folder: str
    """Folder of its run, below that of all runs."""
    stages: dict[str, StageConfig]
    model: str = ""
    """Folder, below that of all runs, of the model that the first stage starts from, which the
    script of the same name here writes; empty starts from scratch."""


@dataclass(frozen=True)
class Experiment:
    """Arms from one start, and the questions that they answer."""

    title: str
    base: Base
    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]
    start: dict[str, StageConfig] = dataclasses.field(default_factory=dict)
    """Stages after those of the base, if its model is not what all arms start from."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the run's config that it sets for the base and for all arms."""


def train_config(
    root: Path,
    stages: dict[str, StageConfig],
    seed: int,
    *,
    scratch: bool = False,
    built: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Return the config of a run.

    Args:
        root: Benchmark in M-BEIR layout.
        stages: Stages of the run.
        seed: Seed of the run.
        scratch: Whether the first stage starts from random weights; otherwise it names a model,
            whose prompt and image sizes all stages take over.
        built: Training data that another run built; None builds them.
        settings: Further fields of the config.
    """
    steps = max(one.steps or 0 for one in stages.values())
    config = TrainConfig(
        data=DataConfig(root=root, built=built),
        stages=stages,
        seed=seed,
        scratch=SCRATCH if scratch else None,
        images=ImageConfig(min_pixels=56 * 56, max_pixels=56 * 56) if scratch else None,
        prompt=PromptConfig(template="bare", max_text_tokens=64) if scratch else None,
        compute=ComputeConfig(dtype="float32"),
        # Evaluated on validation queries at the end, which tunes, and half-way.
        evaluation=EvaluationConfig(
            every_steps=max(1, steps // 2), max_queries=100, max_candidates=200
        ),
        checkpoint=CheckpointConfig(every_steps=50),
    )
    return dataclasses.replace(config, **(settings or {}))


def stage(
    steps: int = STEPS,
    layers: str = "",
    *,
    loss: LossConfig | None = None,
    distill: DistillConfig | None = None,
    rate: float = 1e-3,
    chunks: int = 1,
    batch: int = 128,
    optimizer: Literal["adamw", "muon"] = "muon",
) -> StageConfig:
    """Return a stage that trains the whole model."""
    return StageConfig(
        steps=steps,
        keep_layers=layers,
        plan=PlanConfig(batch_size=batch),
        grad_cache_chunks=chunks,
        loss=loss or LossConfig(kind="info_nce", temperature=0.05),
        distill=distill or DistillConfig(),
        trainable="full",
        train_vision=True,
        optimizer=OptimizerConfig(kind=optimizer, learning_rate=rate, warmup_ratio=0.1),
    )


BASE_STEPS = 800
SMALL = Base("base", {"whole": stage(BASE_STEPS, rate=2e-3)})
"""A model from scratch."""

# The states of a model this small are of order 1, so their errors count in full.
DISTILL = DistillConfig(weight=(0.5, 0.1), scale=1.0)
SIMILARITIES = DistillConfig(weight=(0.5, 0.5), scale=1.0, target="similarities")
