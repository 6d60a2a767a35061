"""The shape of rows that given items fill best."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from puma_jax.data.packing import place, rows_needed
from puma_jax.errors import PackingError
from puma_jax.rows import RowShape
from puma_jax.typing import Int, ndarray

_STEP = 128  # accelerator kernels want rows of whole tiles
_WIDEST = 1024
_WIDEST_IN_TRAINING = 2048
# Steps that were not looked at may be a little larger; slots, which cost nothing, a good deal.
_HEADROOM = 1.005
_SLOT_HEADROOM = 1.5


def fitting_shape(
    lengths: Int[ndarray, "n"], patches: Int[ndarray, "n"], tokens_per_chunk: int
) -> RowShape:
    """Return a shape of chunk, for one group, that items like these fill well.

    What fits into one row gets a length that is a power of two, so that single queries meet few
    shapes and compile few times. More gets the row lengths that leave the least unused.

    Args:
        lengths: Tokens of each item.
        patches: Image patches of each item.
        tokens_per_chunk: About how many tokens a chunk shall hold.
    """
    lengths, patches = np.asarray(lengths), np.asarray(patches)
    images = patches[patches > 0]
    slots = _power_of_two(max(1, tokens_per_chunk // int(lengths.min())), 1)
    if lengths.sum() <= tokens_per_chunk:
        length, rows = _few_rows(lengths)
        patch_length, patch_rows = _few_rows(images)
        shape = RowShape(rows, length, patch_rows, patch_length, slots)
        # Placed together, tokens and patches may need a row more than each by itself.
        while place(lengths, patches, shape).chunks > 1:
            shape = replace(
                shape, rows=shape.rows + 1, patch_rows=patch_rows and shape.patch_rows + 1
            )
        return shape
    length, all_rows = _least_waste(lengths)
    patch_length, all_patch_rows = _least_waste(images)

    def patch_rows_beside(rows: int) -> int:
        return -(-all_patch_rows * rows // all_rows)

    def cost(rows: int) -> int:
        one = rows * length + patch_rows_beside(rows) * patch_length
        return -(-all_rows // rows) * one

    # Patch rows come in whole numbers: some numbers of token rows leave less of them empty.
    most = max(1, tokens_per_chunk // length)
    rows = min(range(most, most // 2, -1), key=cost)
    return RowShape(rows, length, patch_rows_beside(rows), patch_length, slots)


def _few_rows(sizes: ndarray) -> tuple[int, int]:
    """Return the length and the number of rows, both of few possible values, for one chunk."""
    if not len(sizes):
        return _STEP, 0
    if sizes.sum() <= _WIDEST // 2:
        return _power_of_two(int(sizes.sum()), _STEP // 2), 1
    length, rows = _least_waste(sizes)
    step = max(1, _power_of_two(rows, 1) // 8)
    return length, -(-rows // step) * step


def _least_waste(sizes: ndarray) -> tuple[int, int]:
    """Return the row length, a whole number of steps, that wastes least; and the rows it takes."""
    if not len(sizes):
        return _STEP, 0
    shortest = -(-int(sizes.max()) // _STEP) * _STEP
    candidates = range(shortest, max(shortest, _WIDEST) + _STEP, _STEP)
    needed = {length: rows_needed(sizes, length) for length in candidates}
    length = min(candidates, key=lambda length: length * needed[length])
    return length, needed[length]


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def batch_shape(
    steps: Sequence[tuple[Int[ndarray, "items"], Int[ndarray, "items"]]],
    chunks: int,
    groups: int,
    largest: tuple[int, int],
) -> RowShape:
    """Return the smallest shape of a chunk in which the batches of all these steps fit.

    Row lengths are whole numbers of tiles, rows a whole number for each group. Of the shapes that
    leave least room unused, the one with the shortest rows is taken, for attention grows with them.

    Args:
        steps: Tokens and patches of all items of some steps of a plan.
        chunks: Into how many chunks a batch is cut.
        groups: Data-parallel devices.
        largest: Tokens and patches that a row has to hold, also if no item of the steps does.

    Raises:
        PackingError: No shape holds the steps.
    """
    cells = chunks * groups
    most_items = max(len(lengths) for lengths, _ in steps)
    slots = groups * int(np.ceil(_SLOT_HEADROOM * most_items / cells) + 1)
    token_rows = _row_choices([lengths for lengths, _ in steps], cells, largest[0])
    patch_rows = _row_choices([patches for _, patches in steps], cells, largest[1])
    choices = sorted(
        itertools.product(token_rows, patch_rows),
        key=lambda choice: sum(
            rows * length / (least[0] * least[1] or 1)
            for (rows, length), least in zip(choice, (token_rows[0], patch_rows[0]), strict=True)
        ),
    )
    reason = None
    for (rows, length), (patch_rows_of, patch_length) in choices:
        shape = RowShape(rows * groups, length, patch_rows_of * groups, patch_length, slots, groups)
        try:
            for lengths, patches in steps:
                place(lengths, patches, shape, chunks)
        except PackingError as error:
            reason = error
        else:
            return shape
    raise PackingError(f"no shape of {chunks} chunks holds the batch: {reason}")


def _row_choices(sizes: list[ndarray], cells: int, longest: int) -> list[tuple[int, int]]:
    """Return rows per cell and row lengths that could hold all sizes, the tightest first."""
    total = _HEADROOM * max(int(of_step.sum()) for of_step in sizes)
    if not total:
        return [(0, _STEP)]
    shortest = -(-longest // _STEP) * _STEP
    lengths = range(shortest, max(shortest, _WIDEST_IN_TRAINING) + _STEP, _STEP)
    fewest = [(int(np.ceil(total / (cells * length))), length) for length in lengths]
    with_one_more = [*fewest, *((rows + 1, length) for rows, length in fewest)]
    return sorted(with_one_more, key=lambda choice: (choice[0] * choice[1], choice[1]))
