"""Packed batches: rows of fixed shape that hold the items the host passes to the model."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from puma_jax.typing import AnyArray, Int, UInt8


@dataclass(frozen=True)
class PackedShape:
    """The static shape of one chunk of rows, for all data shards together.

    Rows, patch rows and slots are multiples of `data_shards`. The tokens, patches and slot of an
    item lie in one shard, so only finished vectors cross devices.
    """

    rows: int
    """Token rows."""
    length: int
    """Tokens in a row."""
    patch_rows: int
    patch_length: int
    """Image patches in a patch row."""
    slots: int
    """The most items a chunk can hold."""
    data_shards: int = 1
    """Data-parallel devices that share the chunk."""

    def with_data_shards(self, count: int) -> PackedShape:
        """Return the shape that gives each of so many devices what each has in this one."""
        rows, patch_rows, slots = (
            size // self.data_shards * count for size in (self.rows, self.patch_rows, self.slots)
        )
        return PackedShape(rows, self.length, patch_rows, self.patch_length, slots, count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBatch:
    """Items packed into rows. Token rows and patch rows are filled independently of each other.

    The arrays are NumPy arrays on the host and jax arrays on devices.
    """

    tokens: Int[AnyArray, "*chunks rows length"]
    segment_ids: Int[AnyArray, "*chunks rows length"]
    """Which item of the row each token belongs to; 0 is padding."""
    positions: Int[AnyArray, "*chunks rows length 3"]
    """Time, height and width position of each token in its item."""
    image_token_index: Int[AnyArray, "*chunks rows length"]
    """Index, within the data shard, of the visual token here; −1 for text and padding."""
    patches: UInt8[AnyArray, "*chunks patch_rows patch_length values"]
    """Pixel values of each patch, channel by channel."""
    patch_segment_ids: Int[AnyArray, "*chunks patch_rows patch_length"]
    """Which image of the row each patch belongs to; 0 is padding."""
    patch_positions: Int[AnyArray, "*chunks patch_rows patch_length 2"]
    """Row and column of each patch in its image."""
    pool_index: Int[AnyArray, "*chunks slots"]
    """Index, within the data shard, of the last token of the item in each slot; 0 if unused."""
