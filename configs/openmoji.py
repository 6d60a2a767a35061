"""The demo: a small Qwen2-VL from nothing, on a benchmark that any machine can build.

A deep model learns to retrieve (InfoNCE), is cut to its first third, learns from what it was
(self-distillation), and is trained with MAC-Loss. `quick` takes minutes on the two cores of a
laptop, `full` well under an hour and a half.
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
        preset: How long to train.
    """
    quick = preset == "quick"
    plan = PlanConfig(batch=256)
    return TrainConfig(
        data=DataConfig(root=Path("runs/openmoji")),
        # Wide and shallow: what is to be learnt are names in fourteen languages and the looks of
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
        # Chat turns mean nothing to a model that has never seen one.
        prompt=PromptConfig(template="bare", max_text_tokens=64),
        compute=ComputeConfig(dtype="float32"),
        stages={
            "deep": StageConfig(
                steps=50 if quick else 400,
                plan=plan,
                loss=LossConfig(kind="info_nce", temperature=0.05),
                train="full",
                vision=True,
                optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.1),
            ),
            "distil": StageConfig(
                steps=20 if quick else 150,
                keep_layers="1",
                plan=plan,
                loss=LossConfig(kind="info_nce", temperature=0.05),
                # States of a model this small are of size 1, so their errors count in full.
                distill=DistillConfig(weight=(0.5, 0.1), scale=1.0),
                train="full",
                vision=True,
                optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.1),
            ),
            "mac": StageConfig(
                steps=220 if quick else 900,
                plan=plan,
                loss=LossConfig(kind="mac", temperature=0.03, decay=0.5),
                train="full",
                vision=True,
                optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.1),
            ),
        },
        evaluation=EvaluationConfig(every=0 if quick else 300, final_stages=("deep", "mac")),
        checkpoint=CheckpointConfig(every=100),
    )
