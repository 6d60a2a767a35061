"""The demo: a small Qwen2-VL from scratch, on a benchmark that any machine can build.

Four layers learn to retrieve. The first two of them are kept (`cut`, which trains nothing), learn
from all four (layer pruning with self-distillation), and are trained further (`pruned`). Every
stage is evaluated: what is lost, and what comes back. `quick` takes minutes on the two cores of a
laptop, `full`, with wider layers, about an hour, or minutes on a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

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

INFO_NCE = LossConfig(kind="info_nce", temperature=0.05)
# What finds most in the global pool: docs/results/losses.md.
RELATIVE_MAC = LossConfig(kind="mac", relative=True, temperature=0.12)
NO_TEACHER = DistillConfig()
# The states of a model this small are of order 1, so their errors count in full.
DISTILL = DistillConfig(weight=(0.5, 0.1), scale=1.0)


def get_config(preset: Literal["quick", "full"] = "quick") -> TrainConfig:
    """Return the config of the demo.

    Args:
        preset: Length of training: quick takes minutes, full gives the better model.
    """
    quick = preset == "quick"
    # Small matrices: a CPU is far from its peak with them, but more steps are worth more than that.
    small = ScratchConfig(
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
    wide = dataclasses.replace(
        small, width=256, heads=8, kv_heads=4, mlp_width=768, vision_width=128, vision_heads=4
    )

    def stage(
        steps: int,
        *,
        layers: str = "",
        loss: LossConfig = INFO_NCE,
        distill: DistillConfig = NO_TEACHER,
        rate: float = 2e-3,
    ) -> StageConfig:
        return StageConfig(
            steps=steps,
            keep_layers=layers,
            plan=PlanConfig(batch_size=128 if quick else 256),
            loss=loss,
            distill=distill,
            trainable="full",
            train_vision=True,
            # A small model from scratch goes much further with it than with AdamW.
            optimizer=OptimizerConfig(kind="muon", learning_rate=rate, warmup_ratio=0.1),
        )

    return TrainConfig(
        data=DataConfig(root=Path("runs/openmoji")),
        scratch=small if quick else wide,
        # Each drawing is one image of 56 × 56 pixels, four visual tokens.
        images=ImageConfig(min_pixels=56 * 56, max_pixels=56 * 56),
        # Chat turns mean nothing to a model that was never trained on them.
        prompt=PromptConfig(template="bare", max_text_tokens=64),
        compute=ComputeConfig(dtype="float32"),
        stages={
            "deep": stage(500 if quick else 1000),
            "cut": stage(0, layers="2"),
            "distil": dataclasses.replace(
                stage(40 if quick else 100, layers="2", distill=DISTILL, rate=1e-3),
                init_from="deep",
            ),
            "pruned": stage(220 if quick else 500, loss=RELATIVE_MAC, rate=1e-3),
        },
        evaluation=EvaluationConfig(
            final_stages=("deep", "cut", "distil", "pruned"),
        ),
        checkpoint=CheckpointConfig(every_steps=100),
    )
