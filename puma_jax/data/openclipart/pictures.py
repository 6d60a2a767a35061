"""Render clip art onto squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from puma_jax.data.demo.pictures import rasterize
from puma_jax.typing import UInt8, ndarray

_INK = 250
"""Level of a channel below which a pixel is not white."""
_LEAST_INK = 0.005
_LARGER = 4
"""Factor at which pictures are rendered first: many are small on a large page."""


def render(file: Path, size: int) -> UInt8[ndarray, "size size 3"] | None:
    """Return a picture, without margins, in the middle of a white square.

    Args:
        file: The SVG file.
        size: Width and height of the square in pixels.

    Returns:
        The square; it is white if the picture is. None if the file cannot be rendered.
    """
    try:
        svg = file.read_text(encoding="utf-8")
        page = rasterize(svg, _LARGER * size, None)
        if len(page) > _LARGER * size:
            page = rasterize(svg, None, _LARGER * size)
    except ValueError:  # not in UTF-8, or not what resvg renders
        return None
    square = Image.new("RGB", (size, size), "white")
    rows, columns = (np.flatnonzero((page.min(-1) < _INK).any(axis)) for axis in (1, 0))
    if len(rows):
        picture = Image.fromarray(page[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        scale = size / max(picture.size)
        width, height = (max(1, round(scale * side)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        square.paste(picture, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def is_blank(picture: UInt8[ndarray, "size size 3"]) -> bool:
    """Return whether next to nothing of a picture can be seen."""
    return bool((picture.min(-1) < _INK).mean() < _LEAST_INK)
