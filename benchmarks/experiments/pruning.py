"""The experiments on pruning: depths, what is kept and what is distilled; and depth itself."""

from __future__ import annotations

from arms import BASE_STEPS, DISTILL, SMALL, STEPS, Arm, Base, Experiment, Question, stage

from puma_jax.training.config import DistillConfig

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

DEPTH = Experiment(
    title="How many layers a model from scratch needs",
    base=Base("untrained", {"whole": stage(1)}),  # a step, so that there are data
    arms=tuple(
        Arm(name, label, stage(BASE_STEPS + STEPS, layers, rate=2e-3), forgets="all")
        for name, label, layers in (
            ("four", "4 layers", ""),
            ("two", "2 layers", "2"),
            ("one", "1 layer", "1"),
        )
    ),
    questions=(
        Question("two", "four", "Do two layers from scratch find as much as four?"),
        Question("one", "four", "And one?"),
    ),
)
"""All arms start from the same random weights."""
