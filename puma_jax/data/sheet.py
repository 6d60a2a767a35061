"""Render items as thumbnails for contact sheets."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from puma_jax.data.images import open_image

THUMBNAIL_SIZE = (150, 96)
"""Width and height of a thumbnail, in pixels."""
_PICTURE = 44
_LINES = 3
_FONT_SIZE = 10


def thumbnail(image: Path | None, text: str | None, label: str, color: str = "gray") -> Image.Image:
    """Return an item as a small picture: its label, its image, its text below.

    Args:
        image: File of the image, if there is one.
        text: Text, cut to fit; the font has Latin letters only.
        label: A word for the corner.
        color: Color of the label.

    Raises:
        ImageError: The image cannot be read.
    """
    picture = Image.new("RGB", THUMBNAIL_SIZE, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    pen.text((4, 2), label, color, font)
    top = 16
    if image is not None:
        picture.paste(open_image(image).resize((_PICTURE, _PICTURE)), (50, 4))
        top = _PICTURE + 6
    lines = textwrap.wrap(text or "", width=25, max_lines=_LINES, placeholder="...")
    pen.text((4, top), "\n".join(lines), "black", font)
    return picture
