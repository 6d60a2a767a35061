"""Images in requests, checked before they are decoded, and images of documents, as answers."""

from __future__ import annotations

import base64
import binascii
import functools
import io
from pathlib import Path

from PIL import Image

from puma_jax.data.decode import DecodeError, decoded, displayed_size
from puma_jax.data.thumbnails import thumbnail
from puma_jax.errors import ImageError
from puma_jax.service.request_errors import RequestError
from puma_jax.service.settings import ServiceConfig

# What browsers show. Other formats are sent as JPEG.
_SHOWN_AS = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "AVIF": "image/avif",
    "BMP": "image/bmp",
}
WIDTHS = (128, 256, 512, 1024)
"""Widths of thumbnails; another width is served as the next larger one."""
_THUMBNAILS_KEPT = 512


def image_from_url(url: str, settings: ServiceConfig) -> bytes:
    """Return the bytes of an image in a data: URL.

    Raises:
        RequestError: The URL is of another kind: the service fetches nothing.
        ImageError: The image is no base64, no image, or has too many pixels.
    """
    head, comma, data = url.partition(",")
    if not head.lower().startswith("data:") or not comma:
        raise RequestError(
            400,
            "unsupported_image_url",
            f'the URL of an image begins with "{url[:12]}", expected data:image/...;base64,...: '
            "the service fetches no images",
        )
    if not head.lower().endswith(";base64"):
        raise ImageError(f'a data: URL begins with "{head[:80]}", expected data:image/...;base64')
    return image_from_base64(data, settings)


def image_from_base64(text: str, settings: ServiceConfig) -> bytes:
    """Return the bytes of an image in base64, checked by `check_image`."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"an image is not valid base64: {error}") from None
    return check_image(data, settings)


def check_image(data: bytes, settings: ServiceConfig) -> bytes:
    """Return the bytes of an image file that is small enough to be decoded.

    Raises:
        ImageError: It is no image that is decoded, or has too many pixels.
    """
    try:
        height, width = displayed_size(data)
    except DecodeError as error:
        raise ImageError(str(error)) from error
    if height * width > settings.max_image_pixels:
        raise ImageError(
            f"image of {width} × {height} pixels has more than the "
            f"{settings.max_image_pixels:,} that are read: make it smaller"
        )
    return data


def document_image(path: Path, width: int | None) -> tuple[bytes, str]:
    """Return the image of a document as a browser shows it, and its media type.

    Args:
        path: Path of the file, from the index.
        width: Width in pixels of a thumbnail; None for the file itself, or a JPEG of the same size
            if browsers do not show its format.

    Raises:
        RequestError: The file is gone, or can no longer be decoded.
    """
    try:
        if width is not None:
            size = min((known for known in WIDTHS if known >= width), default=WIDTHS[-1])
            return _thumbnail(path, path.stat().st_mtime_ns, size), "image/webp"
        Image.init()
        with Image.open(path, formats=[name for name in _SHOWN_AS if name in Image.OPEN]) as image:
            shown_as = _SHOWN_AS[image.format or ""]
        return path.read_bytes(), shown_as
    except (OSError, DecodeError) as error:
        if width is None and path.is_file():
            return _as_jpeg(path), "image/jpeg"
        raise RequestError(
            404, "image_gone", f"the image of this document cannot be read: {_reason(error)}"
        ) from None


@functools.lru_cache(maxsize=_THUMBNAILS_KEPT)
def _thumbnail(path: Path, modified_ns: int, width: int) -> bytes:
    """Return an image in WebP, made smaller if it is wider; a changed file is read again."""
    return thumbnail(path, width, 4 * width)


def _as_jpeg(path: Path) -> bytes:
    try:
        with decoded(path) as image:
            out = io.BytesIO()
            image.save(out, "JPEG", quality=90)
            return out.getvalue()
    except DecodeError as error:
        raise RequestError(
            404, "image_gone", f"the image of this document cannot be read: {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """Return why a file cannot be read, without its path, which is nobody's business."""
    return "the file is missing" if isinstance(error, FileNotFoundError) else "it is damaged"
