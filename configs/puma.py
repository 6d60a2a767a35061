"""PUMA as published (arXiv 2507.08064): Qwen2-VL-7B pruned to 12 layers, trained in two stages.

(paper) marks values of the paper's text, (code) those of the released code.

    python -m puma_jax.data.text_pairs --table nli_for_simcse.csv --out data/nli
    python -m puma_jax.train --config configs/puma.py --workdir runs/puma \
        --data.root data/M-BEIR --stages.distil.data-root data/nli

`--model Qwen/Qwen2-VL-2B-Instruct` takes another base. One with visual tokens of another size takes
`--token-side` too: `--model Qwen/Qwen3-VL-4B-Instruct --token-side 32`.
"""

from __future__ import annotations

from pathlib import Path

from puma_jax.config import ComputeConfig, ImageConfig, LoraConfig, PlanConfig, PromptConfig
from puma_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)


def get_config(
    model: str = "Qwen/Qwen2-VL-7B-Instruct", keep_layers: str = "12", token_side: int = 28
) -> TrainConfig:
    """Return the recipe.

    Args:
        model: Hugging Face folder or hub id to start from.
        keep_layers: Decoder layers to keep: "12" for the first twelve, or indices such as
            "0-10,27".
        token_side: Side of a visual token in pixels: 28 for Qwen2-VL and Qwen2.5-VL, 32 for
            Qwen3-VL.
    """
    return TrainConfig(
        data=DataConfig(root=Path("data/M-BEIR")),
        # 4 to 300 visual tokens (paper).
        images=ImageConfig(min_pixels=4 * token_side**2, max_pixels=300 * token_side**2),
        # Text is truncated to 450 tokens (code). The released code numbers positions in one
        # dimension; serving engines compute M-RoPE.
        prompt=PromptConfig(max_text_tokens=450, positions="mrope"),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        stages={
            "distil": StageConfig(
                model=model,
                epochs=2.0,  # (paper)
                keep_layers=keep_layers,  # the first 12 of 28 (code)
                data_root=Path("data/nli"),  # nli_for_simcse.csv, sent0 and sent1 (code)
                plan=PlanConfig(batch_size=288, instructions=False),  # (code)
                grad_cache_chunks=4,
                loss=LossConfig(kind="info_nce", temperature=0.05),  # (code)
                # 0.9 · InfoNCE + 0.1 · 0.05 · (MSE of queries + MSE of candidates) (code).
                # The code's other setting, InfoNCE at 0.5 + 0.4 · progress, is (0.5, 0.1).
                distill=DistillConfig(weight=(0.1, 0.1), scale=0.05),
                trainable="lora",
                lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),  # (paper, dropout: code)
                # Layer 0 learns at half the rate of the others (code).
                optimizer=OptimizerConfig(learning_rate=2e-4, first_layer_lr_scale=0.5),
            ),
            "mac": StageConfig(
                epochs=2.0,  # (paper)
                plan=PlanConfig(batch_size=600, instructions=True),  # (code)
                grad_cache_chunks=10,
                # Stays at 0.03 for other modalities, falls to 0.018 for the target's own (code).
                loss=LossConfig(kind="mac", temperature=0.03, decay=0.5),
                trainable="lora",
                lora=LoraConfig(rank=128, alpha=256.0, dropout=0.1),  # (paper, dropout: code)
                optimizer=OptimizerConfig(learning_rate=3e-4),  # (code)
            ),
        },
        evaluation=EvaluationConfig(every_steps=500, max_queries=200, max_candidates=5000),
        checkpoint=CheckpointConfig(every_steps=200),
    )
