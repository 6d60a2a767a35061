"""Position ids, made on the host: M-RoPE for tokens, row and column for patches."""

from __future__ import annotations

from collections.abc import Sequence

import einops
import numpy as np

from puma_jax.typing import Bool, Int, ndarray


def mrope_positions(
    visual: Bool[ndarray, "length"], grids: Sequence[tuple[int, int]]
) -> Int[ndarray, "length 3"]:
    """Time, height and width position of every token of one item (arXiv 2409.12191, section 2.1).

    Text counts on by one, the same in all three. An image's visual tokens share one time position
    and count their row and column from there; the text behind goes on after the largest so far.

    Args:
        visual: Which tokens stand for an image; one run of true for each image.
        grids: Rows and columns of visual tokens (after merging) of each image, in order.

    Returns:
        int32 positions that begin at 0.

    Raises:
        ValueError: The runs of visual tokens do not have the sizes of `grids`.
    """
    length = len(visual)
    positions = np.empty((length, 3), np.int32)
    start, at = 0, 0  # next position to give, next token to give it to
    for rows, columns in grids:
        first = at + int(np.argmax(visual[at:])) if visual[at:].any() else length
        last = first + rows * columns
        if last > length or not visual[first:last].all():
            raise ValueError(f"no run of {rows} × {columns} visual tokens at token {first}")
        positions[at:first] = np.arange(start, start + first - at)[:, None]
        start += first - at
        positions[first:last, 0] = start
        positions[first:last, 1] = start + np.repeat(np.arange(rows), columns)
        positions[first:last, 2] = start + np.tile(np.arange(columns), rows)
        start += max(rows, columns)
        at = last
    if visual[at:].any():
        raise ValueError(f"visual tokens after token {at} belong to none of {len(grids)} images")
    positions[at:] = np.arange(start, start + length - at)[:, None]
    return positions


def counted_positions(length: int) -> Int[ndarray, "length 3"]:
    """Plain positions 0, 1, 2, ...: what the released PUMA code trains with."""
    return np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, axis=1)


def patch_positions(rows: int, columns: int, merge_size: int) -> Int[ndarray, "patches 2"]:
    """Row and column of every patch of an image, in the order the tower reads them.

    Patches that merge into one visual token stand together: block by block of `merge_size`², and
    row by row inside a block.

    Args:
        rows: Patches from top to bottom, a multiple of `merge_size`.
        columns: Patches from left to right, a multiple of `merge_size`.
        merge_size: Side of a block, in patches.
    """
    return einops.rearrange(
        np.indices((rows, columns), dtype=np.int32),
        "yx (block_row row) (block_column column) -> (block_row block_column row column) yx",
        row=merge_size,
        column=merge_size,
    )
