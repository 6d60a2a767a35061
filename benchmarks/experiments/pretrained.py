"""The experiment on a pretrained decoder: SmolLM2-135M, pruned to a half and to a third.

    python benchmarks/experiments/smollm2.py --out runs/experiments/smollm2
    python benchmarks/experiments/run.py pretrained --data.root runs/openmoji --out runs/experiments

All weights are trained, as in the other experiments, whose costs are counted in the same way.
By formula, for items of 17 tokens, a step is 1.4 TFLOP with 30 layers, 0.7 with 15 (1.2 with a
teacher) and 0.5 with 10 (0.9), and an evaluation of OpenMoji's pools 57, 28 and 19. All of it, with
one seed, is some 0.7 PFLOP: two hours of two cores at 100 GFLOP/s. The base takes 10 GB of memory.
"""

from __future__ import annotations

from arms import Arm, Base, Experiment, Question, stage

from puma_jax.training.config import DistillConfig, StageConfig

SMOLLM2 = Base(
    "smollm2-base", {"whole": stage(150, rate=5e-4, batch=64, optimizer="adamw")}, model="smollm2"
)
"""SmolLM2-135M, a decoder of 30 layers that was trained on texts, with a new vision tower."""
# The squares of its states are 3.3 in the mean, so errors count relative to them.
DISTILL = DistillConfig(weight=(0.5, 0.1), scale=0.3)


def _stage(layers: str, distill: DistillConfig | None = None, steps: int = 40) -> StageConfig:
    return stage(steps, layers, distill=distill, rate=2e-4, batch=64, optimizer="adamw")


PRETRAINED = Experiment(
    title="Pruning a pretrained decoder",
    base=SMOLLM2,
    arms=(
        Arm("full", "30 layers", _stage("")),
        Arm("keep-15", "15 layers", _stage("15")),
        Arm("keep-15-distilled", "15 layers, distilled", _stage("15", DISTILL)),
        Arm("keep-10", "10 layers", _stage("10")),
        Arm("keep-10-distilled", "10 layers, distilled", _stage("10", DISTILL)),
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
    ),
)
