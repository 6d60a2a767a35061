"""Small pictures of queries and documents, for sheets that people look at."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = (150, 96)
"""Width and height of a cell, in pixels."""
_PICTURE = 44
_LINES = 3
_FONT_SIZE = 10


def cell(image: Path | None, text: str | None, mark: str, colour: str = "gray") -> Image.Image:
    """Return an item as a small picture: its mark, its image, its text below.

    Args:
        image: File of the image.
        text: Shown as far as it fits, in a font that knows Latin letters.
        mark: A word for the corner.
        colour: Of the mark.
    """
    sheet = Image.new("RGB", CELL, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    pen.text((4, 2), mark, colour, font)
    top = 16
    if image is not None:
        with Image.open(image) as picture:
            sheet.paste(picture.resize((_PICTURE, _PICTURE)), (50, 4))
        top = _PICTURE + 6
    lines = textwrap.wrap(text or "", width=25, max_lines=_LINES, placeholder="...")
    pen.text((4, top), "\n".join(lines), "black", font)
    return sheet
