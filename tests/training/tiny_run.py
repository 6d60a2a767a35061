"""A run of seconds: a deep model from scratch, then its first layers with adapters, taught."""

from pathlib import Path

from puma_jax.config import ComputeConfig, ImageConfig, LoraConfig, PlanConfig, PromptConfig
from puma_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    ScoreDistillConfig,
    ScratchConfig,
    StageConfig,
    TrainConfig,
)


def get_config(steps: int = 8) -> TrainConfig:
    """Return the config.

    Args:
        steps: Of the second stage.
    """
    return TrainConfig(
        data=DataConfig(root=Path("nowhere")),
        scratch=ScratchConfig(
            vocab_size=400,
            width=32,
            layers=3,
            heads=4,
            kv_heads=2,
            mlp_width=48,
            vision_width=32,
            vision_layers=1,
            vision_heads=2,
        ),
        images=ImageConfig(min_pixels=28 * 28, max_pixels=56 * 56),
        prompt=PromptConfig(template="bare", max_text_tokens=64),
        compute=ComputeConfig(dtype="float32"),
        stages={
            "deep": StageConfig(
                steps=3,
                plan=PlanConfig(batch_size=12),
                trainable="full",
                train_vision=True,
                optimizer=OptimizerConfig(learning_rate=1e-3),
            ),
            "cut": StageConfig(
                steps=steps,
                keep_layers="2",
                plan=PlanConfig(batch_size=12, hard_negatives=1),
                grad_cache_chunks=2,
                loss=LossConfig(kind="mac", temperature=0.1, widths=(8,), exit_layers=(1,)),
                distill=DistillConfig(weight=(0.5, 0.1), scale=1.0),
                score_distill=ScoreDistillConfig(weight=0.5),
                trainable="lora",
                lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1),
                optimizer=OptimizerConfig(learning_rate=1e-2),
            ),
        },
        evaluation=EvaluationConfig(every_steps=4, split="test", max_queries=5, max_candidates=5),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every_steps=1, tensorboard=False),
    )
