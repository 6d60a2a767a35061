"""Items as callers give them: texts, images and instructions, checked before they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puma_jax.data.decode import ImageSource
from puma_jax.errors import ImageError, ItemError

RawItem = Mapping[str, Any]
"""An item: {"text": str}, {"image": path, bytes, PIL image or uint8 array}, or both.

{"image": [...]} is an item of several images, in order. {"instruction": str} beside them is the
instruction of this item alone.
"""


def checked(item: RawItem | str) -> tuple[str | None, tuple[ImageSource, ...], str | None]:
    """Return text, images and instruction of an item, the types of which are right.

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
    if "video" in unknown:
        raise ItemError(
            'an item has a video, which is not read as such: give frames of it as "image": [...]'
        )
    if unknown:
        raise ItemError(f"unknown fields {sorted(unknown)}, expected text, image and instruction")
    text, instruction = item.get("text"), item.get("instruction")
    images = images_of(item)
    if text is None and not images and instruction is None:
        raise ItemError("neither text nor image")
    check_text("text", text)
    for image in images:
        if not isinstance(image, ImageSource):
            raise ImageError(
                f"image is a {type(image).__name__}, expected a path, bytes, a PIL image or an "
                "array, or a list of them"
            )
    return text, images, instruction


def images_of(item: RawItem) -> tuple[Any, ...]:
    """Return the images of an item, in order; none for an item without any."""
    image = item.get("image")
    if image is None:
        return ()
    return tuple(image) if isinstance(image, list | tuple) else (image,)


def check_text(name: str, text: object) -> None:
    """Refuse what is no text, or holds lone surrogates, which no tokenizer reads."""
    if not isinstance(text, str | None):
        raise ItemError(f"{name} is a {type(text).__name__}, expected a str")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ItemError(f"{name} is not valid Unicode: {error.reason}") from None
