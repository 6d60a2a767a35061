"""The experiment on the parts of the recipe: what each adds to a model pruned to 2 layers."""

from __future__ import annotations

import dataclasses

from arms import SIMILARITIES, SMALL, STEPS, Arm, Experiment, Question, stage

from puma_jax.config import ImageConfig, PlanConfig, PromptConfig
from puma_jax.training.config import (
    CheckpointConfig,
    LossConfig,
    ScoreDistillConfig,
    StageConfig,
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


_KEEPS_CHECKPOINTS = {
    "checkpoint": CheckpointConfig(every_steps=5, max_to_keep=4, keep_finished=True)
}
_POOLED = {
    mode: {"images": ImageConfig(56 * 56, 56 * 56, spatial_pool_stride=2, spatial_pool_mode=mode)}
    for mode in ("average", "random")
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
        *(
            Arm(
                f"scratch-{kind}-{rate}",
                f"4 layers from scratch, {label}, learning rate {rate}",
                stage(200, rate=rate, optimizer=kind),
                family=f"scratch-{kind}",
                forgets="all",
            )
            for kind, label in (("muon", "Muon"), ("adamw", "AdamW"))
            for rate in (2e-3, 4e-3)
        ),
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
        *(
            Arm(
                f"similarities-{n}",
                f"{n} of 4 layers, similarities distilled",
                stage(layers=n, distill=SIMILARITIES),
            )
            for n in ("2", "1")
        ),
        Arm(
            "similarities-alone",
            "2 layers, nothing but similarities distilled",
            stage(layers="2", distill=dataclasses.replace(SIMILARITIES, weight=(1.0, 1.0))),
        ),
        Arm(
            "margin",
            "likely answers left out of the negatives",
            stage(layers="2", loss=LossConfig(temperature=0.05, mask_margin=0.1)),
        ),
        Arm(
            "averaged",
            "2 layers, mean of the last 4 checkpoints",
            stage(0),
            continues="plain",
            averages=4,
        ),
        *(
            Arm(f"pooled-{mode}", label, stage(layers="2"), settings=_POOLED[mode])
            for mode, label in (
                ("average", "a visual token an image, the mean of 4"),
                ("random", "a visual token an image, drawn from 4"),
            )
        ),
        Arm("both-ways", "attention both ways, mean", stage(layers="2"), settings=_BOTH_WAYS),
        *(
            Arm(
                f"adamw-{rate}",
                f"AdamW, learning rate {rate}",
                stage(layers="2", rate=rate, optimizer="adamw"),
                family="adamw",
            )
            for rate in (5e-4, 1e-3, 2e-3)
        ),
    ),
    questions=(
        Question("negatives", "plain", "Two hard negatives for each query, equal steps?"),
        Question("negatives-equal", "plain", "Two hard negatives for each query, equal cost?"),
        Question("scores", "negatives", "Distilled scores of the whole model, beside negatives?"),
        Question("matryoshka", "plain", "What do further depths and widths cost the whole model?"),
        Question("matryoshka-1", "one", "Its first layer, or a model of one layer?"),
        Question("similarities-2", "plain", "Distilled similarities, 2 layers?"),
        Question("similarities-1", "one", "Distilled similarities, 1 layer?"),
        Question("similarities-alone", "plain", "Nothing but distilled similarities?"),
        Question("margin", "plain", "Negatives far above the positive left out?"),
        Question("averaged", "plain", "The mean of the last four checkpoints?"),
        Question("pooled-average", "plain", "A quarter of the visual tokens?"),
        Question("pooled-average", "pooled-random", "Their mean, or one drawn at random?"),
        Question("both-ways", "plain", "Attention both ways with mean pooling?"),
        Question("adamw", "plain", "AdamW in place of Muon?"),
        Question("scratch-adamw", "scratch-muon", "And from scratch, for 200 steps?"),
        Question("plain-noise", "plain", "How far does rounding alone move a result?"),
    ),
)
