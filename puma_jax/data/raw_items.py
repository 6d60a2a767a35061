"""Items as callers give them: texts, images and instructions, checked before they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from puma_jax.data.decode import ImageSource
from puma_jax.errors import ImageError, ItemError

RawItem = Mapping[str, Any]
"""An item: {"text": str}, {"image": path, bytes, PIL image or uint8 array}, or both.

{"image": [...]} is an item of several images, in order. {"video": [...]} in their place is a video,
whose frames were taken at {"fps": float}, 2 a second by default. {"instruction": str} beside them
is the instruction of this item alone.
"""

_FIELDS = ("text", "image", "video", "fps", "instruction")
_FPS = 2.0


class Parts(NamedTuple):
    """The text, images, video frames and instruction of an item."""

    text: str | None
    images: tuple[ImageSource, ...]
    frames: tuple[ImageSource, ...]
    """Frames of a video."""
    fps: float
    instruction: str | None


def checked(item: RawItem | str) -> Parts:
    """Return the parts of an item, the types of which are right.

    Raises:
        ItemError: The item has none of them, a field of the wrong kind, or an unknown one.
    """
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, Mapping):
        raise ItemError(
            f'an item is a {type(item).__name__}, expected a text or {{"text": ..., "image": ...}}'
        )
    unknown = set(item) - {*_FIELDS}
    if unknown:
        raise ItemError(f"unknown fields {sorted(unknown)}, expected {', '.join(_FIELDS)}")
    text, instruction, video = (item.get(name) for name in ("text", "instruction", "video"))
    images, fps = images_of(item), item.get("fps", _FPS)
    if not isinstance(video, list | tuple | None):
        raise ItemError(f"video is a {type(video).__name__}, expected a list of its frames")
    frames = tuple(video or ())
    if not isinstance(fps, int | float) or not 0 < fps < math.inf or ("fps" in item and not frames):
        raise ItemError(f"fps is {fps!r}, expected frames a second, of an item with a video")
    if images and frames:
        raise ItemError("an item has images and a video, expected one of the two")
    if text is None and not images and not frames and instruction is None:
        raise ItemError("neither text nor image")
    check_text("text", text)
    for image in (*images, *frames):
        if not isinstance(image, ImageSource):
            raise ImageError(
                f"image is a {type(image).__name__}, expected a path, bytes, a PIL image or an "
                "array, or a list of them"
            )
    return Parts(text, images, frames, float(fps), instruction)


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
