"""Images in: opened, resized to a whole number of visual tokens, cut into patches.

The arithmetic of sizes and the order of patches are those of transformers' `Qwen2VLImageProcessor`
(pixels are scaled and normalised later, on the device; see `model.vision`).
"""

from __future__ import annotations

import io
import math
import os

import numpy as np
from PIL import Image

from puma_jax.config import ImageConfig, VisionConfig
from puma_jax.errors import ImageError
from puma_jax.typing import UInt8, ndarray

ImageSource = str | os.PathLike | bytes | Image.Image | ndarray

_MOST_ELONGATED = 200
_MOST_PIXELS = 2**26


def open_image(source: ImageSource) -> Image.Image:
    """Return a decoded RGB image.

    Args:
        source: A path, the bytes of a file, a PIL image, or uint8 pixels [height, width, 3].

    Raises:
        ImageError: There is no such file, or it cannot be decoded.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ImageError(
                f"image array is {source.dtype} {list(source.shape)}, "
                "expected uint8 [height, width, 3]"
            )
        return Image.fromarray(source)
    name = "image" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            # PIL only warns of these, and a warning cannot be made an error in one thread alone.
            if image.width * image.height > _MOST_PIXELS:
                raise ImageError(
                    f"{name} has {image.width} × {image.height} pixels, "
                    f"more than the {_MOST_PIXELS:,} that are decoded"
                )
            return image.convert("RGB")
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except Exception as error:  # decoders raise whatever their format's parser trips over
        raise ImageError(f"{name} cannot be decoded: {error}") from error


def resized_size(
    height: int, width: int, vision: VisionConfig, limits: ImageConfig
) -> tuple[int, int]:
    """Return the height and width, in pixels, that an image is resized to.

    Both are multiples of `patch_size` × `merge_size`, their product lies within the limits, and
    the proportions change as little as that allows.

    Raises:
        ImageError: One side is more than 200 times the other.
    """
    if max(height, width) > _MOST_ELONGATED * min(height, width):
        raise ImageError(
            f"image of {width} × {height} pixels is too elongated: "
            f"one side may be {_MOST_ELONGATED} times the other"
        )
    unit = vision.patch_size * vision.merge_size
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > limits.max_pixels:
        shrink = math.sqrt(height * width / limits.max_pixels)
        rows = max(1, math.floor(height / shrink / unit))
        columns = max(1, math.floor(width / shrink / unit))
    elif rows * columns * unit**2 < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (height * width))
        rows = math.ceil(height * grow / unit)
        columns = math.ceil(width * grow / unit)
    return rows * unit, columns * unit


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
    height, width = resized_size(image.height, image.width, vision, limits)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    side, merge = vision.patch_size, vision.merge_size
    rows, columns = height // side, width // side
    pixels = np.asarray(image).reshape(
        rows // merge, merge, side, columns // merge, merge, side, vision.channels
    )
    patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1)
    return patches, (rows, columns)
