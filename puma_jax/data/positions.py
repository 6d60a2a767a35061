"""Position ids, made on the host: M-RoPE for tokens, row and column for patches."""

from __future__ import annotations

from collections.abc import Sequence

import einops
import numpy as np

from puma_jax.typing import Bool, Int, ndarray


def mrope_positions(
    image_token_mask: Bool[ndarray, "length"],
    grids: Sequence[tuple[int, int, int]],
    time_step: float = 1.0,
) -> Int[ndarray, "length 3"]:
    """Return time, height and width position of every token (arXiv 2409.12191, section 2.1).

    Text advances all three by one. The visual tokens of an image share one time position and add
    their row and column to it; those of a video advance in time, too. The text after them continues
    after the largest row or column, as in transformers.

    Args:
        image_token_mask: Which tokens are placeholders of visual tokens; one run for each image.
        grids: Times, rows and columns of visual tokens (after merging) of each image, in order.
        time_step: Time positions from one time to the next, rounded down after they are added up.

    Returns:
        int32 positions that start at 0.

    Raises:
        ValueError: The runs of visual tokens do not have the sizes of `grids`.
    """
    length = len(image_token_mask)
    positions = np.empty((length, 3), np.int32)
    start, at = 0, 0  # next position to give, next token to give it to
    for times, rows, columns in grids:
        remaining = image_token_mask[at:]
        first = at + int(np.argmax(remaining)) if remaining.any() else length
        last = first + times * rows * columns
        if last > length or not image_token_mask[first:last].all():
            raise ValueError(f"no run of {rows} × {columns} visual tokens at token {first}")
        positions[at:first] = np.arange(start, start + first - at)[:, None]
        start += first - at
        grid = np.indices((times, rows, columns)).reshape(3, -1).T
        # In float32, as the reference has it.
        passed = grid[:, 0].astype(np.float32) * np.float32(time_step)
        positions[first:last, 0] = start + passed.astype(np.int32)
        positions[first:last, 1:] = start + grid[:, 1:]
        start += max(rows, columns)
        at = last
    if image_token_mask[at:].any():
        raise ValueError(f"visual tokens after token {at} belong to none of {len(grids)} images")
    positions[at:] = np.arange(start, start + length - at)[:, None]
    return positions


def sequential_positions(length: int) -> Int[ndarray, "length 3"]:
    """Return positions 0, 1, 2, ..., which the released PUMA code trains with."""
    return np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, axis=1)


def patch_positions(
    rows: int, columns: int, merge_size: int, pool_stride: int = 1
) -> Int[ndarray, "patches 2"]:
    """Return row and column of every patch of an image, in the order the tower reads them.

    Patches that merge into one visual token are adjacent, and so are visual tokens that are pooled
    into one: row by row of pooled blocks, inside each row by row of visual tokens, inside each row
    by row of patches.

    Args:
        rows: Patches from top to bottom, a multiple of `merge_size` × `pool_stride`.
        columns: Patches from left to right, likewise.
        merge_size: Side of a visual token of the tower, in patches.
        pool_stride: Side of a pooled block, in visual tokens of the tower.
    """
    return einops.rearrange(
        np.indices((rows, columns), dtype=np.int32),
        "yx (block_row token_row row) (block_column token_column column)"
        " -> (block_row block_column token_row token_column row column) yx",
        token_row=pool_stride,
        token_column=pool_stride,
        row=merge_size,
        column=merge_size,
    )
