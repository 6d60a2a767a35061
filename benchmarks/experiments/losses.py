"""The experiment on contrastive losses, each at several temperatures."""

from __future__ import annotations

import dataclasses

from arms import DISTILL, SMALL, Arm, Experiment, Question, stage

from puma_jax.training.config import LossConfig

TEMPERATURES = (0.05, 0.03, 0.08, 0.12)
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
