"""Small copies of images, for pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from puma_jax.data.decode import decoded

_QUALITY = 82


def thumbnail(path: str | Path, width: int, height: int) -> bytes:
    """Return a copy of an image in WebP, made smaller until it fits into a box.

    Args:
        path: File of the image.
        width: Width of the box, in pixels.
        height: Height of the box, in pixels.

    Raises:
        DecodeError: The image cannot be read.
    """
    with decoded(path) as image:
        image.thumbnail((width, height))
        out = io.BytesIO()
        image.save(out, "WEBP", quality=_QUALITY)
        return out.getvalue()


def thumbnail_uri(path: str | Path, side: int) -> str:
    """Return a small copy of an image as a data: URI; see `thumbnail`, whose box is a square."""
    return f"data:image/webp;base64,{base64.b64encode(thumbnail(path, side, side)).decode()}"
