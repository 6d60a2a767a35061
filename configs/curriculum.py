"""A curriculum: pairs of texts, pairs of pictures and captions, M-BEIR, then mined hard negatives.

The order is that of U-MARVEL (arXiv 2507.14902); settings without a comment are those of
configs/puma.py. No run has measured these choices.

The first three stages are one run. Negatives are mined with its model, and a second run trains on
them; it takes the finished stages from the first.

    python -m puma_jax.train --config configs/curriculum.py --workdir runs/curriculum
    python -m puma_jax.mine --model runs/curriculum/mbeir --data.root data/M-BEIR --out data/mined
    python -m puma_jax.train --config configs/curriculum.py --mined data/mined \
        --workdir runs/curriculum-hard --reuse runs/curriculum
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from puma_jax.config import PlanConfig
from puma_jax.train import load_config
from puma_jax.training.config import LossConfig, OptimizerConfig, TrainConfig


def get_config(
    model: str = "Qwen/Qwen2-VL-2B-Instruct",
    keep_layers: str = "12",
    token_side: int = 28,
    mined: Path | None = None,
) -> TrainConfig:
    """Return the recipe.

    Args:
        model: Hugging Face folder or hub id to start from.
        keep_layers: Decoder layers to keep, as in configs/puma.py.
        token_side: Side of a visual token in pixels, as in configs/puma.py.
        mined: Benchmark with mined hard negatives, for a fourth stage; None trains three.
    """
    puma = load_config(Path(__file__).with_name("puma.py"))(model, keep_layers, token_side)
    text, mbeir = puma.stages["distil"], puma.stages["mac"]
    # Pictures and captions in both directions, a set for each. A set's share of the batches is
    # settable: --stages.captions.plan.mixture-weights coco_task0 2 coco_task3 1.
    captions = dataclasses.replace(
        text,
        model=None,
        keep_layers="",
        distill=mbeir.distill,
        epochs=1.0,
        data_root=Path("data/captions"),
        plan=PlanConfig(batch_size=600, instructions=True),
        grad_cache_chunks=mbeir.grad_cache_chunks,
    )
    stages = {"text": text, "captions": captions, "mbeir": mbeir}
    if mined is not None:
        stages["hard"] = dataclasses.replace(
            mbeir,
            epochs=1.0,
            data_root=mined,
            # All pairs of a batch from one set: its other documents are negatives of the same kind.
            plan=PlanConfig(
                batch_size=300, instructions=True, hard_negatives=4, homogeneous_batches=True
            ),
            loss=LossConfig(kind="mac", temperature=0.03, decay=0.5, mask_same_document=True),
            optimizer=OptimizerConfig(learning_rate=1e-4),
        )
    return dataclasses.replace(puma, stages=stages)
