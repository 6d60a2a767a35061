"""One item, ready for the model: tokens, positions and patches of one text, image or both."""

from __future__ import annotations

from dataclasses import dataclass

from puma_jax.typing import Bool, Int, UInt8, ndarray


@dataclass(frozen=True)
class Item:
    """What one item brings into packed rows. Its last token is [RET]."""

    tokens: Int[ndarray, "length"]
    positions: Int[ndarray, "length 3"]
    """Time, height and width position of each token."""
    visual: Bool[ndarray, "length"]
    """Which tokens only hold the place of a visual token, in the order of the patches."""
    patches: UInt8[ndarray, "patches values"]
    patch_positions: Int[ndarray, "patches 2"]
    """Row and column of each patch in its image."""
    patch_images: Int[ndarray, "patches"]
    """Which of the item's images each patch belongs to, from 0."""
