"""The demo: a small Qwen2-VL from scratch, on a benchmark that any machine can build.

Three layers learn to retrieve (InfoNCE). The first of them is kept and learns from all three (layer
pruning with self-distillation); then it is trained with MAC-Loss. For comparison, all three layers
are trained further with the same loss, for about as much computation. `quick` takes minutes on the
two cores of a laptop, `full` an hour and a half.
"""

from __future__ import annotations

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


def get_config(preset: Literal["quick", "full"] = "quick") -> TrainConfig:
    """Return the config of the demo.

    Args:
        preset: Length of training: quick takes minutes, full gives the better model.
    """
    quick = preset == "quick"
    plan = PlanConfig(batch_size=256)
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_ratio=0.1)
    # The form of MAC-Loss that keeps texts and images comparable, so that one index can hold both.
    mac = LossConfig(kind="mac", relative=True, temperature=0.03, decay=0.5)
    return TrainConfig(
        data=DataConfig(root=Path("runs/openmoji")),
        # Wide and shallow: the task is to learn names in fourteen languages and the looks of
        # things, and small matrix products leave a CPU idle.
        scratch=ScratchConfig(
            vocab_size=4096,
            width=256,
            layers=3,
            heads=8,
            kv_heads=4,
            mlp_width=768,
            vision_width=96,
            vision_layers=3,
            vision_heads=3,
        ),
        # Each drawing is one image of 56 × 56 pixels, four visual tokens.
        images=ImageConfig(min_pixels=56 * 56, max_pixels=56 * 56),
        # Chat turns mean nothing to a model that was never trained on them.
        prompt=PromptConfig(template="bare", max_text_tokens=64),
        compute=ComputeConfig(dtype="float32"),
        stages={
            "deep": StageConfig(
                steps=80 if quick else 400,
                plan=plan,
                loss=LossConfig(kind="info_nce", temperature=0.05),
                trainable="full",
                train_vision=True,
                optimizer=optimizer,
            ),
            # A step of three layers takes 1.6 times as long as one of a single layer.
            "full": StageConfig(
                steps=130 if quick else 570,
                init_from="deep",
                plan=plan,
                loss=mac,
                trainable="full",
                train_vision=True,
                optimizer=optimizer,
            ),
            "distil": StageConfig(
                steps=20 if quick else 150,
                init_from="deep",
                keep_layers="1",
                plan=plan,
                loss=LossConfig(kind="info_nce", temperature=0.05),
                # The states of a model this small are of order 1, so their errors count in full.
                distill=DistillConfig(weight=(0.5, 0.1), scale=1.0),
                trainable="full",
                train_vision=True,
                optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.1),
            ),
            "mac": StageConfig(
                steps=210 if quick else 900,
                plan=plan,
                loss=mac,
                trainable="full",
                train_vision=True,
                optimizer=optimizer,
            ),
        },
        evaluation=EvaluationConfig(
            every_steps=0 if quick else 300, final_stages=("deep", "full", "distil", "mac")
        ),
        checkpoint=CheckpointConfig(every_steps=100),
    )
