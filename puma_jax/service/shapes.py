"""The few shapes of packed rows that the service compiles at start, and uses for all requests."""

from __future__ import annotations

from puma_jax.axes import TILE
from puma_jax.embedder import Embedder
from puma_jax.parallel.mesh import data_shards
from puma_jax.rows import PackedShape

_SHORTEST_ROW = TILE // 2
_FEWEST_TOKENS = 4
_STEP = 4


def serving_shapes(embedder: Embedder, tokens_per_chunk: int) -> list[PackedShape]:
    """Return shapes in which any item fits, and any number of items wastes little.

    Texts alone have shapes without patch rows: one row that grows by factors of two, for requests
    that come alone, then rows of 128 tokens and rows of the longest text, up to a full chunk.
    Shapes with images have as many patch rows as token rows, for small images and for the largest.

    Args:
        embedder: The model, whose config says how large items are.
        tokens_per_chunk: Tokens, and patches, that a device reads in one forward pass at most.
    """
    longest, _ = embedder.largest_item(image=False)
    longest_with_image, most_patches = embedder.largest_item(image=True)
    longest, longest_with_image, most_patches = (
        _whole_tiles(size) for size in (longest, longest_with_image, most_patches)
    )
    sizes: set[tuple[int, int, int, int]] = set()
    length = _SHORTEST_ROW
    while length < longest:
        sizes.add((1, length, 0, TILE))
        length *= 2
    for row in {TILE, longest}:
        sizes |= {(rows, row, 0, TILE) for rows in _ladder(tokens_per_chunk // row)}
    patches = 2 * TILE
    while patches < most_patches:
        row = min(longest_with_image, 2 * TILE)
        sizes |= {
            (rows, row, rows, patches) for rows in _ladder(tokens_per_chunk // max(row, patches))
        }
        patches *= 4
    widest = max(longest_with_image, most_patches)
    sizes |= {
        (rows, longest_with_image, rows, most_patches)
        for rows in _ladder(tokens_per_chunk // widest)
    }
    shards = 1 if embedder.mesh is None else data_shards(embedder.mesh)
    return [
        PackedShape(rows, length, patch_rows, patch_length, _slots(rows * length)).with_data_shards(
            shards
        )
        for rows, length, patch_rows, patch_length in sorted(sizes)
    ]


def _ladder(most: int) -> set[int]:
    """Return 1, 4, 16 and so on up to a number, and the number itself."""
    most = max(1, most)
    steps, rows = {most}, 1
    while rows < most:
        steps.add(rows)
        rows *= _STEP
    return steps


def _whole_tiles(size: int) -> int:
    return -(-size // TILE) * TILE


def _slots(tokens: int) -> int:
    """Return a number of items that so many tokens never exceed by much."""
    return max(1, tokens // _FEWEST_TOKENS)
