"""The few shapes of packed rows that the service compiles at start, and uses for all requests."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from puma_jax.data.shapes import fitting_shape
from puma_jax.embedder import Embedder
from puma_jax.parallel.mesh import data_shards
from puma_jax.rows import PackedShape

_QUERY = "a red bicycle in front of a house"
# Up to so many items, counts of items grow by factors of two, and by factors of four beyond.
_FINE_STEPS = 8


def serving_shapes(
    embedder: Embedder, tokens_per_chunk: int, images_per_item: int = 1
) -> list[PackedShape]:
    """Return shapes in which any item fits, and in which usual items waste little.

    For each of four kinds of items, there are shapes for 1, 2, 4, 8, 32 and so on of them, up to a
    full chunk: short texts, the longest text, images of the largest area with a short text, and the
    largest item there can be, of one image and of as many as it may have.

    Args:
        embedder: The model, whose config says how large items are.
        tokens_per_chunk: Tokens, and patches, that a device reads in one forward pass at most; a
            single item may be larger.
        images_per_item: Images of the largest size that an item may have.
    """
    text = len(embedder.preprocess(_QUERY).tokens)
    # Photos are larger than the models' limit, and are reduced to it.
    side = math.isqrt(embedder.config.images.max_pixels)
    photo = embedder.preprocess({"text": _QUERY, "image": np.zeros((side, side, 3), np.uint8)})
    kinds = (
        (text, 0),
        embedder.largest_item(images=0),
        (len(photo.tokens), len(photo.patches)),
        *(embedder.largest_item(images=images) for images in {1, images_per_item}),
    )
    shapes = {
        _shape(length, patches, count, tokens_per_chunk)
        for length, patches in kinds
        for count in _counts(tokens_per_chunk // max(length, patches))
    }
    # Slots cost nothing: with as many in all shapes, fewer shapes differ.
    slots = max(shape.slots for shape in shapes)
    shapes = {replace(shape, slots=slots) for shape in shapes}
    shards = 1 if embedder.mesh is None else data_shards(embedder.mesh)
    ordered = sorted(
        shapes, key=lambda shape: (shape.patch_rows, shape.patch_length, shape.rows, shape.length)
    )
    return [shape.with_data_shards(shards) for shape in ordered]


def _shape(length: int, patches: int, count: int, tokens: int) -> PackedShape:
    """Return a shape of one chunk that some equal items fill well."""
    return fitting_shape(
        np.full(count, length), np.full(count, patches), max(tokens, count * length)
    )


def _counts(most: int) -> list[int]:
    """Return 1, 2, 4, 8, 32 and so on, up to a number."""
    counts = [1]
    while (following := counts[-1] * (2 if counts[-1] < _FINE_STEPS else 4)) <= most:
        counts.append(following)
    return counts
