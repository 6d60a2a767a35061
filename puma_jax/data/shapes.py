"""The shape of rows that costs the least for given items."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from puma_jax.axes import TILE
from puma_jax.data.packing import place, place_in, rows_filled, rows_needed
from puma_jax.rows import PackedShape
from puma_jax.typing import Int, ndarray

_WIDEST = 1024
_WIDEST_IN_TRAINING = 2048
# At rows of this length attention, which compares all tokens of a row, takes as long as the rest of
# a layer of Qwen2-VL-2B; in a smaller model it does so at shorter ones.
_ATTENTION_LENGTH = 16384
# Room for steps that were not looked at: a little in rows, more in slots, which cost nothing.
_HEADROOM = 1.005
_SLOT_HEADROOM = 1.5
# Rows hold steps up to this many standard deviations above the mean. A step that does not fit costs
# more than twice as much, and a compilation: it should be rare.
_DEVIATIONS = 4
# The most steps that a shape is tried on, the fullest.
_TRIED = 32


def fitting_shape(
    lengths: Int[ndarray, "n"], patches: Int[ndarray, "n"], tokens_per_chunk: int
) -> PackedShape:
    """Return a shape of a chunk, for one data shard, that items like these fill well.

    Items that fit into one chunk get few possible shapes (one row has a length that is a power of
    two), so that single queries compile few programs. More items get the row lengths that waste
    the least.

    Args:
        lengths: Tokens of each item.
        patches: Image patches of each item.
        tokens_per_chunk: About how many tokens a chunk holds.
    """
    lengths, patches = np.asarray(lengths), np.asarray(patches)
    images = patches[patches > 0]
    slots = _power_of_two(max(1, tokens_per_chunk // int(lengths.min())), 1)
    if lengths.sum() <= tokens_per_chunk:
        length, rows = _few_rows(lengths)
        patch_length, patch_rows = _few_rows(images)
        shape = PackedShape(rows, length, patch_rows, patch_length, slots)
        # Placed together, tokens and patches may need one row more than each alone.
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

    # The number of patch rows is rounded up: some numbers of token rows waste less by that.
    most = max(1, tokens_per_chunk // length)
    rows = min(range(most, most // 2, -1), key=cost)
    return PackedShape(rows, length, patch_rows_beside(rows), patch_length, slots)


def _few_rows(sizes: ndarray) -> tuple[int, int]:
    """Return length and number of rows for one chunk, each out of few possible values."""
    if not len(sizes):
        return TILE, 0
    if sizes.sum() <= _WIDEST // 2:
        return _power_of_two(int(sizes.sum()), TILE // 2), 1
    length, rows = _least_waste(sizes)
    step = max(1, _power_of_two(rows, 1) // 8)
    return length, -(-rows // step) * step


def _least_waste(sizes: ndarray) -> tuple[int, int]:
    """Return the row length, a multiple of the tile, that costs the least, and the rows needed."""
    if not len(sizes):
        return TILE, 0
    shortest = -(-int(sizes.max()) // TILE) * TILE
    candidates = range(shortest, max(shortest, _WIDEST) + TILE, TILE)
    needed = {length: rows_needed(sizes, length) for length in candidates}
    length = min(candidates, key=lambda length: _cost(needed[length], length))
    return length, needed[length]


def _cost(rows: int, length: int) -> float:
    """Return what rows cost, in tokens that attend to nothing."""
    return rows * length * (1 + length / _ATTENTION_LENGTH)


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def batch_shape(
    steps: Sequence[tuple[Int[ndarray, "_"], Int[ndarray, "_"]]],
    chunks: int,
    data_shards: int,
    largest: tuple[int, int],
    *,
    sampled: bool = False,
) -> PackedShape:
    """Return the smallest shape of a chunk that holds the batches of all these steps.

    Row lengths are multiples of the tile, and every data shard has the same number of rows. Long
    rows waste fewer tokens, but the cost of attention grows with them. There always is a shape:
    where every slot has a row of its own, an item that finds a slot finds a row.

    Args:
        steps: Tokens and patches of all items of some steps of a plan.
        chunks: Chunks in a batch.
        data_shards: Data-parallel devices.
        largest: Tokens and patches that a row must hold even if no item of these steps has them.
        sampled: Whether the steps are a sample of many; if so, room is left for how steps differ.
    """
    cells = chunks * data_shards
    most_items = max(len(lengths) for lengths, _ in steps)
    slots = data_shards * int(np.ceil(_SLOT_HEADROOM * most_items / cells) + 1)
    fullest = _fullest(steps)
    seen = steps if sampled else fullest
    for tries in itertools.count():
        token_rows, patch_rows = (
            _row_choices([step[i] for step in seen], cells, largest[i], sampled, tries)
            for i in (0, 1)
        )
        for (rows, length), (rows_of_patches, patch_length) in _cheapest_first(
            token_rows, patch_rows
        ):
            shape = PackedShape(
                rows * data_shards,
                length,
                rows_of_patches * data_shards,
                patch_length,
                slots,
                data_shards,
            )
            if all(place_in(*sizes, shape, chunks) is not None for sizes in fullest):
                return shape
    raise AssertionError("unreachable")


def _cheapest_first(
    token_rows: list[tuple[int, int]], patch_rows: list[tuple[int, int]]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return all pairs of choices, each list sorted by its cost: those that cost the least first.

    Tokens and patches count alike, each as a share of the cheapest choice.
    """
    least = [_cost(*choices[0]) or 1 for choices in (token_rows, patch_rows)]

    def cost(choice: tuple[tuple[int, int], tuple[int, int]]) -> float:
        return sum(_cost(*rows) / lowest for rows, lowest in zip(choice, least, strict=True))

    return sorted(itertools.product(token_rows, patch_rows), key=cost)


def _fullest(steps: Sequence[tuple[ndarray, ndarray]]) -> list[tuple[ndarray, ndarray]]:
    """Return the steps with the most tokens or patches, the fullest first."""
    totals = np.array([(lengths.sum(), patches.sum()) for lengths, patches in steps])
    fullness = (totals / np.maximum(totals.max(0), 1)).max(1)
    return [steps[i] for i in np.argsort(-fullness, kind="stable")[:_TRIED]]


def _row_choices(
    sizes: list[ndarray], cells: int, longest: int, sampled: bool, tries: int
) -> list[tuple[int, int]]:
    """Return (rows in a cell, row length) pairs that could hold all sizes, the cheapest first.

    The rows of the first try are a lower bound; every later try has more of them.
    """
    longest = max(longest, *(int(of_step.max(initial=0)) for of_step in sizes))
    if not longest:
        return [(0, TILE)]
    shortest = -(-longest // TILE) * TILE
    choices = []
    for length in range(shortest, max(shortest, _WIDEST_IN_TRAINING) + TILE, TILE):
        filled = np.array([rows_filled(of_step, length) for of_step in sizes])
        total = _HEADROOM * filled.max()
        if sampled:
            total = max(total, filled.mean() + _DEVIATIONS * filled.std())
        rows = max(1, int(np.ceil(total * (16 + tries) / (16 * cells))))
        choices += [(rows, length), (rows + 1, length)]
    return sorted(choices, key=lambda choice: _cost(*choice))
