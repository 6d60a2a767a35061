"""Floating-point operations of a model, counted by formula.

Counted are the products with weights, 2 for each weight and position that it applies to, and those
of attention, 4 · width for each pair of positions (half of the pairs in the causal decoder). A
backward pass costs twice its forward pass where all weights are trained. Positions are those of
items, without padding. Patch embeddings count as published, for all frames of a patch. Norms,
softmaxes, the loss and the optimizer are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from puma_jax.config import ModelConfig
from puma_jax.model import encoder
from puma_jax.model.tree import named_leaves
from puma_jax.training.config import StageConfig
from puma_jax.typing import Float, Int, ndarray

_BACKWARD = 2
"""Cost of a backward pass in forward passes."""


def forward_flops(
    model: ModelConfig, tokens: Int[ndarray, "items"], patches: Int[ndarray, "items"]
) -> Float[ndarray, "items"]:
    """Return the operations of a forward pass for each item.

    Args:
        model: Config of the model.
        tokens: Tokens of each item, visual tokens included.
        patches: Patches of each item's image; 0 for none.
    """
    leaves = named_leaves(encoder.abstract(model))
    decoder, vision = model.decoder, model.vision
    inner = decoder.heads * decoder.head_dim
    flops = 2.0 * _weights(leaves, "decoder.layers.") * tokens
    flops = flops + 2.0 * inner * decoder.layers * tokens.astype(float) ** 2
    if vision.layers:
        each = _weights(leaves, "vision.patch_embedding.") + _weights(leaves, "vision.blocks.")
        flops += 2.0 * each * patches
        flops += 2.0 * _weights(leaves, "vision.merger.") * patches / vision.merged
        flops += 4.0 * vision.width * vision.layers * patches.astype(float) ** 2
    return flops


def training_flops(student: float, teacher: float, stage: StageConfig) -> float:
    """Return the operations of training on items whose forward passes cost this much.

    Args:
        student: Operations of the student's forward pass.
        teacher: Operations of the teacher's forward pass.
        stage: The stage, which trains all weights.
    """
    passes = 1 + _BACKWARD + (stage.grad_cache_chunks > 1)
    return passes * student + (stage.distill.on and not stage.distill.cached) * teacher


def _weights(leaves: Mapping[str, Any], prefix: str) -> int:
    """Return the number of weights in the matrices below a name."""
    return sum(
        int(np.prod(leaf.shape))
        for name, leaf in leaves.items()
        if name.startswith(prefix) and name.endswith(".kernel")
    )
