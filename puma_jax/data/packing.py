"""Packing of items of any length into rows of a fixed shape.

There are two steps, so that a plan needs only lengths: `place` says where every item goes, `fill`
copies the items there. A chunk is the input of one forward pass; a data shard is the part of it
that one device reads; a cell is one data shard of one chunk. An item has its tokens in one token
row and its patches in one patch row of the same cell.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from puma_jax.config import VisionConfig
from puma_jax.data.items import Item
from puma_jax.errors import PackingError
from puma_jax.rows import PackedBatch, PackedShape
from puma_jax.typing import Int, UInt8, ndarray


@dataclass(frozen=True)
class Packing:
    """The place of each of n items. Rows and slots are numbered through all shards of a chunk."""

    chunks: int
    chunk: Int[ndarray, "n"]
    row: Int[ndarray, "n"]
    column: Int[ndarray, "n"]
    patch_row: Int[ndarray, "n"]
    patch_column: Int[ndarray, "n"]
    slot: Int[ndarray, "n"]

    def host_slice(
        self, shape: PackedShape, host: int, hosts: int
    ) -> tuple[Int[ndarray, "m"], Packing, PackedShape]:
        """Return the part of one host; hosts hold equal runs of data shards, in order.

        Returns:
            The indices of the items on the host, their packing within its rows, and the shape.
        """
        local = replace(
            shape,
            rows=shape.rows // hosts,
            patch_rows=shape.patch_rows // hosts,
            slots=shape.slots // hosts,
            data_shards=shape.data_shards // hosts,
        )
        items = np.flatnonzero(self.slot // local.slots == host)
        here = Packing(
            chunks=self.chunks,
            chunk=self.chunk[items],
            row=self.row[items] - host * local.rows,
            column=self.column[items],
            patch_row=np.maximum(self.patch_row[items] - host * local.patch_rows, 0),
            patch_column=self.patch_column[items],
            slot=self.slot[items] - host * local.slots,
        )
        return items, here, local


def place(
    lengths: Int[ndarray, "n"],
    patches: Int[ndarray, "n"],
    shape: PackedShape,
    min_chunks: int = 1,
) -> Packing:
    """Return a place for every item, a pure function of the lengths.

    Items with images are placed first, the largest first, each in the cell with the most room for
    patches. Items of text then fill the token rows, each in the fullest row that has room for it.

    Args:
        lengths: Tokens of each item.
        patches: Image patches of each item; 0 for text.
        shape: The shape of a chunk.
        min_chunks: The fewest chunks to use. Items that do not fit take the fewest more that hold
            them; as many chunks as there are items always do.

    Raises:
        PackingError: An item is larger than a row.
    """
    lengths, patches = np.asarray(lengths), np.asarray(patches)
    _check_items_fit_a_row(lengths, patches, shape)
    fullest = max(
        lengths.sum() / (shape.rows * shape.length),
        patches.sum() / max(1, shape.patch_rows * shape.patch_length),
        len(lengths) / shape.slots,
    )
    chunks = max(min_chunks, int(np.ceil(fullest)))
    while (packing := place_in(lengths, patches, shape, chunks)) is None:
        chunks += 1
    return packing


def place_in(
    lengths: Int[ndarray, "n"], patches: Int[ndarray, "n"], shape: PackedShape, chunks: int
) -> Packing | None:
    """Return a place for every item in exactly this many chunks, or None if they do not fit."""
    return _Cells(shape, chunks).place_all(lengths, patches)


class _Cells:
    """Free room in every row of every cell while items are placed."""

    def __init__(self, shape: PackedShape, chunks: int):
        self.shape = shape
        self.chunks = chunks
        self.cells = chunks * shape.data_shards
        self.rows = shape.rows // shape.data_shards
        self.patch_rows = shape.patch_rows // shape.data_shards
        self.slots = shape.slots // shape.data_shards
        self.items_in = [0] * self.cells
        # Sorted (room, row) pairs: the tightest row that fits is one bisection away.
        self.room = [[(shape.length, row) for row in range(self.rows)] for _ in range(self.cells)]
        self.patch_room = [
            [(shape.patch_length, row) for row in range(self.patch_rows)] for _ in range(self.cells)
        ]
        # A heap of (minus the number of free patches, cell).
        self.emptiest = [
            (-self.patch_rows * shape.patch_length, cell) for cell in range(self.cells)
        ]

    def place_all(self, lengths: ndarray, patches: ndarray) -> Packing | None:
        """Place every item, or return None if one of them finds no room."""
        places = np.zeros((len(lengths), 6), np.int32)
        largest_first = np.lexsort((-lengths, -patches))
        images = largest_first[patches[largest_first] > 0]
        texts = largest_first[patches[largest_first] == 0]
        for i in images.tolist():
            of_image = self._place_image(int(lengths[i]), int(patches[i]))
            if of_image is None:
                return None
            places[i] = of_image
        if len(texts):
            of_texts = self._place_texts(lengths[texts].tolist())
            if of_texts is None:
                return None
            places[texts] = of_texts
        cell, row, column, patch_row, patch_column, slot = places.T
        shard = cell % self.shape.data_shards
        return Packing(
            chunks=self.chunks,
            chunk=cell // self.shape.data_shards,
            row=shard * self.rows + row,
            column=column,
            patch_row=shard * self.patch_rows + patch_row,
            patch_column=patch_column,
            slot=shard * self.slots + slot,
        )

    def _place_image(self, length: int, patches: int) -> tuple[int, ...] | None:
        passed_over = []
        while self.emptiest:
            free, cell = heapq.heappop(self.emptiest)
            room, patch_room = self.room[cell], self.patch_room[cell]
            fits = (
                self.items_in[cell] < self.slots
                and room[-1][0] >= length
                and patch_room[-1][0] >= patches
            )
            passed_over.append((free + patches if fits else free, cell))
            if fits:
                row, column = _take(room, length, self.shape.length)
                patch_row, patch_column = _take(patch_room, patches, self.shape.patch_length)
                for entry in passed_over:
                    heapq.heappush(self.emptiest, entry)
                return (cell, row, column, patch_row, patch_column, self._next_slot(cell))
        return None

    def _place_texts(self, lengths: list[int]) -> list[tuple[int, ...]] | None:
        # One list over all cells: a text may go anywhere. Among rows with equal room, the first row
        # of every cell comes before the second of any, so that cells run out of slots together.
        room = sorted(
            (free, row, cell) for cell in range(self.cells) for free, row in self.room[cell]
        )
        places: list[tuple[int, ...]] = []
        for length in lengths:
            at = bisect.bisect_left(room, (length,))
            while at < len(room) and self.items_in[room[at][2]] == self.slots:
                room.pop(at)
            if at == len(room):
                return None
            free, row, cell = room.pop(at)
            bisect.insort(room, (free - length, row, cell))
            places.append((cell, row, self.shape.length - free, 0, 0, self._next_slot(cell)))
        return places

    def _next_slot(self, cell: int) -> int:
        self.items_in[cell] += 1
        return self.items_in[cell] - 1


def fill(
    items: Sequence[Item], packing: Packing, shape: PackedShape, vision: VisionConfig
) -> PackedBatch:
    """Return the packed batch with every item copied to its place.

    Args:
        items: The items, in the order of `packing`.
        packing: From `place`, for the same shape.
        shape: The shape of a chunk.
        vision: The config of the tower, which says how many values a patch has.

    Returns:
        NumPy arrays with a leading axis of chunks.
    """
    # Still images have the values of one frame, unless a video shares their batch.
    values = max((item.patches.shape[1] for item in items), default=vision.patch_values)
    tokens = (packing.chunks, shape.rows, shape.length)
    patches = (packing.chunks, shape.patch_rows, shape.patch_length)
    rows = PackedBatch(
        tokens=np.zeros(tokens, np.int32),
        segment_ids=np.zeros(tokens, np.int32),
        positions=np.zeros((*tokens, 3), np.int32),
        image_token_index=np.full(tokens, -1, np.int32),
        patches=np.zeros((*patches, values), np.uint8),
        patch_segment_ids=np.zeros(patches, np.int32),
        patch_positions=np.zeros((*patches, 2), np.int32),
        pool_index=np.zeros((packing.chunks, shape.slots), np.int32),
    )
    token_rows, patch_rows = shape.rows // shape.data_shards, shape.patch_rows // shape.data_shards
    for i, item in enumerate(items):
        chunk, row, column = packing.chunk[i], packing.row[i], packing.column[i]
        end = column + len(item.tokens)
        here = (chunk, row, slice(column, end))
        rows.tokens[here] = item.tokens
        rows.positions[here] = item.positions
        # The first column is an id that is unique within the row and needs no counter.
        rows.segment_ids[here] = column + 1
        rows.pool_index[chunk, packing.slot[i]] = (row % token_rows) * shape.length + end - 1
        if len(item.patches):
            row, column = packing.patch_row[i], packing.patch_column[i]
            there = (chunk, row, slice(column, column + len(item.patches)))
            rows.patches[there] = _with_frames(item.patches, values, vision)
            rows.patch_positions[there] = item.patch_positions
            rows.patch_segment_ids[there] = column + 1 + item.patch_images
            visual = int(item.image_token_mask.sum())
            offset = (row % patch_rows) * shape.patch_length + column
            first = offset // (len(item.patches) // visual)
            rows.image_token_index[here][item.image_token_mask] = first + np.arange(visual)
    return rows


def _with_frames(
    patches: UInt8[ndarray, "n _"], values: int, vision: VisionConfig
) -> UInt8[ndarray, "n {values}"]:
    """Return patches of so many values, the frame of a still image repeated in each channel."""
    frames = values // patches.shape[1]
    if frames == 1:
        return patches
    channels = patches.reshape(len(patches), vision.channels, 1, -1)
    return np.repeat(channels, frames, axis=2).reshape(len(patches), values)


def rows_needed(sizes: Int[ndarray, "n"], length: int) -> int:
    """Return how many rows of this length hold items of these sizes."""
    room: list[tuple[int, int]] = []
    for size in (-np.sort(-np.asarray(sizes))).tolist():
        at = bisect.bisect_left(room, (size,))
        free, row = room.pop(at) if at < len(room) else (length, len(room))
        bisect.insort(room, (free - size, row))
    return len(room)


def rows_filled(sizes: Int[ndarray, "n"], length: int) -> float:
    """Return how many rows of a length items of these sizes fill at least, parts of rows counted.

    This is the bound L2 of Martello and Toth (1990) before it is rounded up: of two items that are
    larger than half a row each has its own, and only what fits beside them shares it.
    """
    sizes = np.sort(np.asarray(sizes))
    total = np.concatenate([[0], np.cumsum(sizes)])
    halves = int(np.searchsorted(2 * sizes, length, side="right"))
    # Items smaller than these are left out in turn: they would fit anywhere.
    smallest = np.unique(np.append(sizes[:halves], 0))
    small = total[halves] - total[np.searchsorted(sizes, smallest)]
    shared = np.searchsorted(sizes, length - smallest, side="right")
    room = (shared - halves) * length - (total[shared] - total[halves])
    return len(sizes) - halves + float(np.maximum(small - room, 0).max()) / length


def _take(room: list[tuple[int, int]], size: int, capacity: int) -> tuple[int, int]:
    """Take `size` from the fullest row that has room; return the row and its first free column."""
    free, row = room.pop(bisect.bisect_left(room, (size,)))
    bisect.insort(room, (free - size, row))
    return row, capacity - free


def _check_items_fit_a_row(lengths: ndarray, patches: ndarray, shape: PackedShape) -> None:
    for what, sizes, limit, field, settings in (
        ("tokens", lengths, shape.length, "length", "prompt.max_text_tokens, images.max_pixels"),
        (
            "patches",
            patches,
            shape.patch_length if shape.patch_rows else 0,
            "patch_length",
            "images.max_pixels",
        ),
    ):
        if len(sizes) and sizes.max() > limit:
            i = int(sizes.argmax())
            raise PackingError(
                f"item {i} has {sizes[i]} {what}, a row holds {limit}: use a shape with a larger "
                f"{field}, or lower {settings}"
            )
