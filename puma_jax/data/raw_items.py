"""Items as callers give them: texts, images and instructions, checked before they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puma_jax.data.decode import ImageSource
from puma_jax.errors import ImageError, ItemError

RawItem = Mapping[str, Any]
"""An item: {"text": str}, {"image": path, bytes, PIL image or uint8 array}, or both.

{"instruction": str} beside them is the instruction of this item alone.
"""


def checked(item: RawItem | str) -> tuple[str | None, ImageSource | None, str | None]:
    """Return text, image and instruction of an item, the types of which are right.

    Raises:
        ItemError: The item has none of them, a field of the wrong kind, or an unknown one.
    """
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, Mapping):
        raise ItemError(
            f'an item is a {type(item).__name__}, expected a text or {{"text": ..., "image": ...}}'
        )
    unknown = set(item) - {"text", "image", "instruction"}
    if unknown:
        raise ItemError(f"unknown fields {sorted(unknown)}, expected text, image and instruction")
    text, image, instruction = (item.get(name) for name in ("text", "image", "instruction"))
    if text is None and image is None and instruction is None:
        raise ItemError("neither text nor image")
    check_text("text", text)
    if not isinstance(image, ImageSource | None):
        raise ImageError(
            f"image is a {type(image).__name__}, expected a path, bytes, a PIL image or an array"
        )
    return text, image, instruction


def check_text(name: str, text: object) -> None:
    """Refuse what is no text, or holds lone surrogates, which no tokenizer reads."""
    if not isinstance(text, str | None):
        raise ItemError(f"{name} is a {type(text).__name__}, expected a str")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ItemError(f"{name} is not valid Unicode: {error.reason}") from None
