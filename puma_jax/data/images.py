"""Images in: opened, resized to a whole number of visual tokens, cut into patches.

The arithmetic of sizes and the order of patches are those of transformers' `Qwen2VLImageProcessor`
(pixels are scaled and normalized later, on the device; see `model.vision`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import einops
import numpy as np
from PIL import Image

from puma_jax.config import ImageConfig, VisionConfig
from puma_jax.data.decode import DecodeError, ImageSource, decoded, displayed_size
from puma_jax.errors import ImageError
from puma_jax.typing import Int, UInt8, ndarray

MOST_ELONGATED = 200
"""How many times the short side of an image its long side may be."""


def open_image(source: ImageSource) -> Image.Image:
    """Return an image as a person sees it, in RGB: see `data.decode`.

    Args:
        source: A path, the bytes of a file, a PIL image, or uint8 pixels [height, width, 3].

    Raises:
        ImageError: There is no such file, or it cannot be decoded.
    """
    with _image_errors(), decoded(source) as image:
        return image


def image_size(source: str | os.PathLike | bytes) -> tuple[int, int]:
    """Return the height and width in pixels that `open_image` gives; only a header is read.

    Raises:
        ImageError: There is no such file, or it is no image, or one that is not decoded.
    """
    with _image_errors():
        return displayed_size(source)


def read_patches(
    source: ImageSource, vision: VisionConfig, limits: ImageConfig
) -> tuple[UInt8[ndarray, "patches values"], tuple[int, int]]:
    """Return the patches of an image and their grid, see `patchify`.

    Any number of threads may call it: `data.decode` limits the memory they take together.

    Raises:
        ImageError: As of `open_image` and `patchify`.
    """
    with _image_errors(), decoded(source) as image:
        return patchify(image, vision, limits)


@contextmanager
def _image_errors() -> Iterator[None]:
    """Turn the errors of `data.decode`, which also stands alone, into ours."""
    try:
        yield
    except DecodeError as error:
        raise ImageError(str(error)) from error


def resized_sizes(
    heights: Int[ndarray, "n"], widths: Int[ndarray, "n"], vision: VisionConfig, limits: ImageConfig
) -> tuple[Int[ndarray, "n"], Int[ndarray, "n"]]:
    """Return the heights and widths, in pixels, that images are resized to.

    Both are multiples of the side of a visual token, their product lies within the limits, and the
    proportions change as little as that allows.

    Raises:
        ImageError: One side of an image is more than 200 times the other, or the model has no
            vision tower.
    """
    if not vision.layers and len(heights):
        raise ImageError(
            f"image of {widths[0]} × {heights[0]} pixels: the model has no vision tower and reads "
            "texts only, give it one with puma_jax.compose"
        )
    long, short = np.maximum(heights, widths), np.minimum(heights, widths)
    if (long > MOST_ELONGATED * short).any():
        worst = int(np.argmax(long / short))
        raise ImageError(
            f"image of {widths[worst]} × {heights[worst]} pixels is too elongated: "
            f"one side may be {MOST_ELONGATED} times the other"
        )
    unit = limits.token_side(vision)
    sides = [np.asarray(side, np.float64) for side in (heights, widths)]
    rounded = [np.rint(side / unit) for side in sides]
    shrink = np.sqrt(sides[0] * sides[1] / limits.max_pixels)
    grow = np.sqrt(limits.min_pixels / (sides[0] * sides[1]))
    area = rounded[0] * rounded[1] * unit**2
    rows, columns = (
        np.where(
            area > limits.max_pixels,
            np.maximum(1, np.floor(side / shrink / unit)),
            np.where(area < limits.min_pixels, np.ceil(side * grow / unit), near),
        )
        for side, near in zip(sides, rounded, strict=True)
    )
    return (rows * unit).astype(np.int64), (columns * unit).astype(np.int64)


def patch_counts(
    heights: Int[ndarray, "n"], widths: Int[ndarray, "n"], vision: VisionConfig, limits: ImageConfig
) -> Int[ndarray, "n"]:
    """Return how many patches images become; 0 where height and width are 0, for no image.

    Raises:
        ImageError: One side of an image is more than 200 times the other.
    """
    counts = np.zeros(len(heights), np.int64)
    there = np.asarray(heights) > 0
    rows, columns = resized_sizes(heights[there], widths[there], vision, limits)
    counts[there] = rows * columns // vision.patch_size**2
    return counts


def most_patches(vision: VisionConfig, limits: ImageConfig) -> int:
    """Return a number of patches that no image exceeds.

    It is the area of `max_pixels` for nearly all images. Those whose short side would be less than
    one visual token, or which are enlarged to `min_pixels`, may come out larger.
    """
    unit = limits.token_side(vision) ** 2
    most, least = limits.max_pixels / unit, limits.min_pixels / unit
    thin = math.sqrt(MOST_ELONGATED * most)
    enlarged = least + math.sqrt(MOST_ELONGATED * least) + math.sqrt(least) + 1
    return math.ceil(max(most, thin, enlarged)) * (unit // vision.patch_size**2)


def patchify(
    image: Image.Image, vision: VisionConfig, limits: ImageConfig
) -> tuple[UInt8[ndarray, "patches values"], tuple[int, int]]:
    """Resize an RGB image and cut it into patches.

    Returns:
        The patches, channel by channel, in the order of `positions.patch_positions`; and how many
        there are from top to bottom and from left to right.

    Raises:
        ImageError: The image is too elongated.
    """
    heights, widths = resized_sizes(
        np.array([image.height]), np.array([image.width]), vision, limits
    )
    height, width = int(heights[0]), int(widths[0])
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    side, merge, stride = vision.patch_size, vision.merge_size, limits.spatial_pool_stride
    patches = einops.rearrange(
        np.asarray(image),
        "(block_row token_row row y) (block_column token_column column x) channel"
        " -> (block_row block_column token_row token_column row column) (channel y x)",
        token_row=stride,
        token_column=stride,
        row=merge,
        column=merge,
        y=side,
        x=side,
    )
    return patches, (height // side, width // side)
