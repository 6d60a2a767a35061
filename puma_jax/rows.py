"""Rows of fixed shape that hold packed items: all that passes from the host to the model."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from puma_jax.typing import AnyArray, Int, UInt8


@dataclass(frozen=True)
class RowShape:
    """The static shape of one chunk of rows, for all groups together.

    `groups` is the number of data-parallel devices. Rows, patch rows and slots divide by it, and
    an item lies in one group with everything it has, so that nothing but finished vectors ever
    crosses devices.
    """

    rows: int
    length: int
    """Tokens in a row."""
    patch_rows: int
    patch_length: int
    """Image patches in a patch row."""
    slots: int
    """The most items a chunk can hold."""
    groups: int = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Items packed into rows. Token rows and patch rows are filled independently of each other.

    The arrays are NumPy's on the host and jax's on devices.
    """

    tokens: Int[AnyArray, "*chunks rows length"]
    segments: Int[AnyArray, "*chunks rows length"]
    """Items of a row are told apart by these numbers; 0 is padding."""
    positions: Int[AnyArray, "*chunks rows length 3"]
    """Time, height and width position of each token in its item."""
    visual: Int[AnyArray, "*chunks rows length"]
    """Index, within the group, of the visual token that stands here; −1 where text stands."""
    patches: UInt8[AnyArray, "*chunks patch_rows patch_length values"]
    """Pixel values of each patch, channel by channel."""
    patch_segments: Int[AnyArray, "*chunks patch_rows patch_length"]
    """Images of a row are told apart by these numbers; 0 is padding."""
    patch_positions: Int[AnyArray, "*chunks patch_rows patch_length 2"]
    """Row and column of each patch in its image."""
    ret: Int[AnyArray, "*chunks slots"]
    """Index, within the group, of the token each item ends with. Unused slots hold 0."""
