"""Floating-point operations of a forward pass, counted by formula.

Counted are the products with weights, 2 for each weight and position that it applies to, and those
of attention, 4 · width for each pair of positions (half of the pairs in a causal decoder).
Positions are those of items, without padding. Patch embeddings count as published, for all frames
of a patch. Norms and softmaxes are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from puma_jax.config import ModelConfig
from puma_jax.model import encoder
from puma_jax.model.tree import named_leaves
from puma_jax.typing import Float, Int, ndarray


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
    flops = flops + (2.0 if decoder.causal else 4.0) * inner * decoder.layers * tokens**2.0
    if vision.layers:
        each = _weights(leaves, "vision.patch_embedding.") + _weights(leaves, "vision.blocks.")
        flops += 2.0 * each * patches
        flops += 2.0 * _weights(leaves, "vision.merger.") * patches / vision.merged
        flops += 4.0 * vision.width * vision.layers * patches**2.0
    return flops


def _weights(leaves: Mapping[str, Any], prefix: str) -> int:
    """Return the number of weights in the matrices below a name."""
    return sum(
        int(np.prod(leaf.shape))
        for name, leaf in leaves.items()
        if name.startswith(prefix) and name.endswith(".kernel")
    )
