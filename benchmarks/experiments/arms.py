"""What the experiments compare: a start, arms that all continue from it, and questions.

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
    ScoreDistillConfig,
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
        optimizer=OptimizerConfig(learning_rate=rate, warmup_ratio=0.1),
    )


BASE_STEPS = 800
SMALL = Base("base", {"whole": stage(BASE_STEPS, rate=2e-3)})
"""A model from scratch."""

# The states of a model this small are of order 1, so their errors count in full.
DISTILL = DistillConfig(weight=(0.5, 0.1), scale=1.0)

PRUNING = Experiment(
    title="What pruning costs and what distillation gives back",
    base=SMALL,
    arms=(
        Arm("full", "4 layers", stage()),
        Arm("keep-2", "2 layers", stage(layers="2")),
        Arm("keep-2-distilled", "2 layers, distilled", stage(layers="2", distill=DISTILL)),
        Arm("keep-1", "1 layer", stage(layers="1")),
        Arm("keep-2-noise", "2 layers, other rounding", stage(layers="2", chunks=2)),
        Arm("keep-2-longer", "2 layers, equal cost", stage(109, "2")),
        Arm("keep-2-random", "2 random layers", stage(layers="2"), forgets="layers"),
        Arm("keep-1-distilled", "1 layer, distilled", stage(layers="1", distill=DISTILL)),
        Arm("keep-3", "3 layers", stage(layers="3")),
        Arm(
            "keep-2-distilled-paper",
            "2 layers, distilled as in the paper",
            stage(layers="2", distill=DistillConfig(weight=(0.1, 0.1), scale=0.05)),
            every_seed=False,
        ),
        Arm(
            "keep-2-distilled-more",
            "2 layers, distilled more",
            stage(layers="2", distill=DistillConfig(weight=(0.9, 0.5), scale=1.0)),
            every_seed=False,
        ),
        *(
            Arm(
                f"scratch-{n}",
                f"{n} of 4 layers from scratch",
                stage(BASE_STEPS + STEPS, n, rate=2e-3),
                every_seed=False,
                forgets="all",
            )
            for n in ("2", "1")
        ),
        *(
            Arm(f"keep-{n}-untrained", f"{n} of 4 layers, untrained", stage(0, n), every_seed=False)
            for n in ("3", "2", "1")
        ),
        Arm("keep-2-last", "layers 1 and 4", stage(layers="0,3"), every_seed=False),
        Arm("keep-2-spaced", "layers 1 and 3", stage(layers="0,2"), every_seed=False),
    ),
    questions=(
        *(
            Question(f"keep-{n}-untrained", "full", f"What is left of {n} of 4 layers, untrained?")
            for n in ("3", "2", "1")
        ),
        Question("keep-3", "full", "What does pruning to 3 of 4 layers cost?"),
        Question("keep-2", "full", "What does pruning to half of the layers cost?"),
        Question("keep-1", "full", "What does pruning to a quarter of the layers cost?"),
        Question("keep-2-longer", "full", "And if it trains for as much computation?"),
        Question("keep-2-distilled", "keep-2", "What does distillation give back, 2 layers?"),
        Question("keep-1-distilled", "keep-1", "What does distillation give back, 1 layer?"),
        Question("keep-2-distilled-more", "keep-2", "With more weight?"),
        Question("keep-2-distilled-paper", "keep-2", "With the paper's weight and scale?"),
        Question("keep-2-random", "keep-2", "What are the layers' trained weights worth?"),
        Question("scratch-2", "keep-2", "2 layers trained from scratch for as many steps in all?"),
        Question("scratch-1", "keep-1", "1 layer trained from scratch for as many steps in all?"),
        Question("keep-2-last", "keep-2", "The first and the last layer, or the first two?"),
        Question("keep-2-spaced", "keep-2", "Layers evenly spaced, or the first two?"),
        Question("keep-2-noise", "keep-2", "How far does rounding alone move a result?"),
    ),
)
TEMPERATURES = (0.05, 0.03, 0.08)
LOSSES = {
    "info-nce": ("InfoNCE", LossConfig(kind="info_nce")),
    "mac": ("MAC-Loss, the paper's form", LossConfig(kind="mac")),
    "mac-relative": ("MAC-Loss, relative", LossConfig(kind="mac", relative=True)),
    "mamcl": ("MAMCL", LossConfig(kind="mamcl")),
    "masked": ("InfoNCE, same document masked", LossConfig(mask_same_document=True)),
}


def _loss_arms() -> tuple[Arm, ...]:
    """Return an arm for every loss and temperature, and those without a temperature to tune."""
    tuned = [
        Arm(
            f"{name}-{temperature}",
            f"{label}, τ {temperature}",
            stage(loss=dataclasses.replace(loss, temperature=temperature)),
            family=name,
        )
        for temperature in TEMPERATURES
        for name, (label, loss) in LOSSES.items()
    ]
    learned = LossConfig(kind="info_nce", temperature=0.05, learn_temperature=True)
    noise = LossConfig(kind="info_nce", temperature=0.05)
    return (
        *tuned,
        Arm("learned", "InfoNCE, learned τ", stage(loss=learned)),
        Arm("info-nce-noise", "InfoNCE, τ 0.05, other rounding", stage(loss=noise, chunks=2)),
    )


COMPARED = Experiment(
    title="Contrastive losses from one distilled model",
    base=SMALL,
    start={"distilled": stage(layers="2", distill=DISTILL)},
    arms=_loss_arms(),
    questions=(
        *(
            Question(name, "info-nce", f"{LOSSES[name][0]}, or InfoNCE?")
            for name in LOSSES
            if name != "info-nce"
        ),
        Question("learned", "info-nce", "A learned temperature, or a tuned one?"),
        Question("info-nce-noise", "info-nce-0.05", "How far does rounding alone move a result?"),
    ),
)


def _kept(*, exits: tuple[int, ...] = (), widths: tuple[int, ...] = ()) -> LossConfig:
    """Return InfoNCE at all depths and widths that a model is trained for."""
    return LossConfig(kind="info_nce", temperature=0.05, exit_layers=exits, widths=widths)


def _with_negatives(steps: int = STEPS, weight: float = 0.0) -> StageConfig:
    """Return a stage with two hard negatives for each query, and distilled scores if asked for."""
    return dataclasses.replace(
        stage(steps, "2"),
        plan=PlanConfig(batch_size=128, hard_negatives=2),
        score_distill=ScoreDistillConfig(weight=weight),
    )


def _muon(steps: int, layers: str, rate: float) -> StageConfig:
    """Return a stage that Muon optimizes."""
    one = stage(steps, layers, rate=rate)
    return dataclasses.replace(one, optimizer=dataclasses.replace(one.optimizer, kind="muon"))


_KEEPS_CHECKPOINTS = {
    "checkpoint": CheckpointConfig(every_steps=5, max_to_keep=4, keep_finished=True)
}
_BOTH_WAYS = {
    "causal": False,
    "prompt": PromptConfig(template="bare", max_text_tokens=64, pooling="mean"),
}
RECIPE = Experiment(
    title="What each part of the recipe adds",
    base=SMALL,
    arms=(
        Arm("plain", "2 layers", stage(layers="2"), settings=_KEEPS_CHECKPOINTS),
        Arm("plain-noise", "2 layers, other rounding", stage(layers="2", chunks=2)),
        Arm("negatives", "2 hard negatives a query", _with_negatives(), negatives="mined"),
        Arm(
            "negatives-equal",
            "2 hard negatives a query, equal cost",
            _with_negatives(STEPS // 2),
            negatives="mined",
        ),
        Arm(
            "scores",
            "2 hard negatives, distilled scores",
            _with_negatives(weight=1.0),
            negatives="scored",
        ),
        Arm(
            "matryoshka",
            "trained for 1 and 2 layers, widths 32, 64, 128",
            stage(layers="2", loss=_kept(exits=(1,), widths=(32, 64))),
        ),
        Arm("matryoshka-1", "its first layer", stage(0, "1"), continues="matryoshka"),
        Arm("one", "1 layer", stage(layers="1")),
        Arm(
            "averaged",
            "2 layers, mean of the last 4 checkpoints",
            stage(0),
            continues="plain",
            averages=4,
        ),
        Arm("both-ways", "attention both ways, mean", stage(layers="2"), settings=_BOTH_WAYS),
        *(
            Arm(
                f"muon-{rate}",
                f"Muon, learning rate {rate}",
                _muon(STEPS, "2", rate),
                family="muon",
            )
            for rate in (1e-3, 3e-3)
        ),
    ),
    questions=(
        Question("negatives", "plain", "Two hard negatives for each query, equal steps?"),
        Question("negatives-equal", "plain", "Two hard negatives for each query, equal cost?"),
        Question("scores", "negatives", "Distilled scores of the whole model, beside negatives?"),
        Question("matryoshka", "plain", "What do further depths and widths cost the whole model?"),
        Question("matryoshka-1", "one", "Its first layer, or a model of one layer?"),
        Question("averaged", "plain", "The mean of the last four checkpoints?"),
        Question("both-ways", "plain", "Attention both ways with mean pooling?"),
        Question("muon", "plain", "Muon in place of AdamW?"),
        Question("plain-noise", "plain", "How far does rounding alone move a result?"),
    ),
)
