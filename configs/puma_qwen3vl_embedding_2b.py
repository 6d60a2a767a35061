"""Qwen3-VL-Embedding-2B pruned to 12 of 28 layers, which learn from the whole model on M-BEIR.

The stages are those of configs/puma.py, with three differences: the model keeps its own prompt,
pooling and image sizes; it is distilled on M-BEIR, with instructions, in place of pairs of texts;
and the teacher, an embedder already, has more weight. With hard negatives, which the result has
mined, a third stage trains on. No run has measured these choices.

    python -m puma_jax.train --config configs/puma_qwen3vl_embedding_2b.py --workdir runs/small \
        --data.root data/M-BEIR
    python -m puma_jax.mine --model runs/small/mac --data.root data/M-BEIR --out data/M-BEIR-mined
    python -m puma_jax.train --config configs/puma_qwen3vl_embedding_2b.py --workdir runs/hard \
        --data.root data/M-BEIR --mined data/M-BEIR-mined --reuse runs/small
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from puma_jax.config import PlanConfig
from puma_jax.train import load_config
from puma_jax.training.config import DistillConfig, TrainConfig


def get_config(
    model: str = "Qwen/Qwen3-VL-Embedding-2B", keep_layers: str = "12", mined: Path | None = None
) -> TrainConfig:
    """Return the recipe.

    Args:
        model: Hugging Face folder or hub id of the embedder.
        keep_layers: Decoder layers to keep, as in configs/puma.py; 0, 1 and 2 stay first.
        mined: Benchmark that `puma_jax.mine` wrote; adds the stage "hard", which trains on it.
    """
    puma = load_config(Path(__file__).with_name("puma.py"))(model, keep_layers)
    distil = dataclasses.replace(
        puma.stages["distil"],
        data_root=None,
        plan=PlanConfig(batch_size=288, instructions=True),
        # The other setting of PUMA's code: InfoNCE at 0.5 + 0.4 · progress.
        distill=DistillConfig(weight=(0.5, 0.1), scale=0.05),
    )
    stages = {**puma.stages, "distil": distil}
    if mined is not None:
        mac = stages["mac"]
        stages["hard"] = dataclasses.replace(
            mac,
            data_root=mined,
            epochs=1.0,
            plan=dataclasses.replace(mac.plan, hard_negatives=4),
            optimizer=dataclasses.replace(mac.optimizer, learning_rate=1e-4),
        )
    return dataclasses.replace(puma, images=None, prompt=None, stages=stages)
