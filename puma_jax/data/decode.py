"""Images as a person sees them: files, bytes, PIL images and arrays to upright RGB on white.

The rule, which everything that reads an image follows:

- EXIF orientation is applied, as Pillow's `ImageOps.exif_transpose` does.
- Transparent pixels are laid on white, whichever way the file stores them.
- Gray of 16 bits keeps its high byte, as Pillow keeps that of RGB of 16 bits. Integers of 32 bits
  and floats are refused, because nothing says which value is white.

The first frame of an animation is read. Color profiles are not applied.

Exports copy this file, so it needs only NumPy and Pillow, and its errors are `DecodeError`.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP", "JPEG2000", "PPM", "MPO"),
)
"""Formats that are decoded, by Pillow's names.

All are raster formats that Pillow decodes without another program, with a signature by which they
are told from other files, and a header that binds the size of what is decoded. PostScript, which
starts Ghostscript, TGA, which has no signature, and ICO, which has no such header, are left out.
"""
MAX_PIXELS = 2**26
"""An image file with more pixels is refused. Decoding takes 8 to 12 bytes for each."""
PIXELS_IN_FLIGHT = max(2**27, 2**24 * (os.cpu_count() or 1))
"""So many pixels are decoded and resized at once, over all threads; other images wait."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_STRIP_PIXELS = 2**20
LARGE_PIXELS = 2**24
"""An image with more pixels takes memory that is worth to be given back, or to be limited."""


class DecodeError(ValueError):
    """An image that cannot be opened or decoded."""


@contextmanager
def decoded(source: ImageSource) -> Iterator[Image.Image]:
    """Yield an image as a person sees it, in RGB.

    Its pixels count as in flight until the block ends, so the block must not decode another image.
    Threads may share a PIL image.

    Args:
        source: A path, the bytes of a file, a PIL image, or uint8 pixels [height, width, 3].

    Raises:
        DecodeError: There is no such file, or it cannot be decoded.
    """
    # Pillow decodes an image when its pixels are first needed, and two threads must not.
    alone = _lock_of(source) if isinstance(source, Image.Image) else nullcontext()
    with _opened(source) as image, _in_flight(pixels := image.width * image.height):
        if pixels > LARGE_PIXELS:
            # The C library keeps freed blocks of Pillow's default size, 16 MiB, for their thread,
            # and gives those above 32 MiB back to the system.
            Image.core.set_block_size(2**26)
        with alone:
            rgb = _to_rgb(image, _name(source))
        yield rgb


def displayed_size(source: str | os.PathLike | bytes) -> tuple[int, int]:
    """Return the height and width of an image in pixels, as `decoded` yields it.

    Only the header is read, unless a PNG file has metadata behind its pixels.

    Raises:
        DecodeError: There is no such file, or it is no image, or one that is not decoded.
    """
    with _opened(source) as image:
        if image.format != "PNG" or not _has_late_metadata(getattr(image, "fp", None)):
            # Pillow's method of PNG files decodes the pixels, to find what may come behind them.
            sideways = _orientation(Image.Image.getexif, image) in _SIDEWAYS
            # Of a TIFF file, Pillow tells the upright size, if the orientation is in its tags.
            upright = image.format == "TIFF" and _tag(image, 274) in _SIDEWAYS
            width, height = image.size
            return (width, height) if sideways and not upright else (height, width)
    with decoded(source) as rgb:
        return rgb.height, rgb.width


def image_suffixes() -> set[str]:
    """Return the suffixes of files that are decoded, such as ".jpg", in lower case.

    Those of HEIC files are among them if pillow-heif is installed.
    """
    _register_heif()
    known = Image.registered_extensions()
    return {suffix for suffix, name in known.items() if name in FORMATS and suffix != ".pfm"}


def is_image(path: str | os.PathLike) -> bool:
    """Return whether a file begins as an image that is decoded; only its header is read."""
    try:
        with _opened(path):
            return True
    except DecodeError:
        return False


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image of a kind and size that is decoded."""
    name = _name(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise DecodeError(
                f"image array is {source.dtype} {list(source.shape)}, "
                "expected uint8 [height, width, 3]"
            )
        _check_size(name, source.shape[1], source.shape[0])
        yield Image.fromarray(source)
    elif isinstance(source, Image.Image):
        if isinstance(source, ImageFile.ImageFile) and source.format not in FORMATS:
            raise DecodeError(
                f"{name} is {source.format}, expected one of {_format_names()}: "
                'decode it first, with image.convert("RGB")'
            )
        _check_size(name, *source.size)
        _check_mode(name, source)
        yield source
    else:
        with _file(source, name) as file, _opened_file(file, name) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(
                    f"{name} has {image.width} × {image.height} pixels, "
                    f"more than the {MAX_PIXELS:,} that are decoded"
                )
            _check_size(name, *image.size)
            _check_mode(name, image)
            yield image


def _file(source: str | os.PathLike | bytes, name: str) -> Any:
    """Return an open file; a pipe or a device is refused, which could be waited for forever."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise DecodeError(f"{name} is {kind}, expected an image file")
        return open(source, "rb")
    except FileNotFoundError:
        raise DecodeError(f"{name} does not exist") from None
    except OSError as error:
        raise DecodeError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"{name} cannot be read: {error}") from error


def _opened_file(file: Any, name: str) -> Image.Image:
    """Return the image of a file, whose pixels are not decoded yet."""
    if _is_heif(file.read(64)) and not _register_heif():
        raise DecodeError(
            f"{name} cannot be decoded: HEIC needs pillow-heif, which is not installed: "
            "pip install pillow-heif"
        )
    file.seek(0)
    Image.init()
    try:
        return Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])
    except UnidentifiedImageError:
        raise DecodeError(
            f"{name} cannot be decoded: it is damaged, or none of {_format_names()}"
        ) from None
    except Exception as error:  # decoders raise whatever their format's parser trips over
        raise DecodeError(f"{name} cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return an image as a person sees it; a new one, without metadata to be applied again."""
    try:
        _mend_transparency(image)
        image.load()
        turn = _TURNS.get(_orientation(type(image).getexif, image))
        if image.mode.startswith("I"):
            image = _in_8_bits(image)
        rgb = _on_white(image) if image.has_transparency_data else image.convert("RGB")
        if turn is not None:
            rgb = rgb.transpose(turn)
    except Exception as error:
        raise DecodeError(f"{name} cannot be decoded: {error}") from error
    rgb.info = {}
    return rgb


def _mend_transparency(image: Image.Image) -> None:
    """Bring the transparent color of a PNG file, which Pillow leaves in its bits, to 8 bits."""
    tiles = getattr(image, "tile", None)  # none once it is decoded
    color = image.info.get("transparency")
    if image.format != "PNG" or not tiles or color is None:
        return
    bits = tiles[0][3]
    if bits in ("L;2", "L;4"):
        image.info["transparency"] = color * (85 if bits == "L;2" else 17)
    elif bits == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image with its transparent pixels on white; strip by strip, to save memory."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return rgb


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return an image in 16 bits as one of 8, with an alpha channel if a value is transparent."""
    values = np.asarray(image)
    # Pillow hands on the values of TIFF files as they are: of 12 bits too, and where 0 is white.
    bits = _tag(image, 258) or 16
    gray = (values >> (bits - 8)).astype(np.uint8)
    result = Image.fromarray(~gray if _tag(image, 262) == 0 else gray)
    transparent = image.info.get("transparency")
    if transparent is not None:
        result.putalpha(
            Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255)))
        )
    return result


def _tag(image: Image.Image, number: int) -> int | None:
    """Return a tag of a TIFF file; None if there is none, or the image is of no such file."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def _orientation(getexif: Any, image: Image.Image) -> int:
    """Return an EXIF orientation; 1, which is upright, where there is none that can be read."""
    try:
        return getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # viewers ignore a damaged EXIF block, whatever its parser trips over
        return 1


def _has_late_metadata(file: Any) -> bool:
    """Return whether a PNG file has metadata that can hold an orientation behind its pixels."""
    place = file.tell()
    file.seek(8)
    late, found = False, False
    while not found and len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        late |= kind == b"IDAT"
        keyword = (
            file.read(min(length, 24)) if late and kind in (b"zTXt", b"iTXt", b"tEXt") else b""
        )
        found = late and (
            kind == b"eXIf" or keyword.startswith((b"Raw profile type ", b"XML:com.adobe.xmp"))
        )
        file.seek(length + 4 - len(keyword), os.SEEK_CUR)
    file.seek(place)
    return found


def _check_size(name: str, width: int, height: int) -> None:
    if width * height == 0:
        raise DecodeError(f"{name} has {width} × {height} pixels, expected at least 1 × 1")


def _check_mode(name: str, image: Image.Image) -> None:
    """Refuse numbers without an agreed white; "I" of PNG and PPM files is 16 bits."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        raise DecodeError(
            f'{name} has pixels of mode "{image.mode}", {kind} without an agreed white: '
            "scale them to 8 bits first"
        )


def _name(source: ImageSource) -> str:
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    if isinstance(source, bytes | np.ndarray):
        return "image"
    name = os.fspath(source) or "image"
    return name if name.isprintable() else ascii(name)


def _format_names() -> str:
    return ", ".join(FORMATS)


def _is_heif(head: bytes) -> bool:
    """Return whether a file begins as HEIF, and is not AVIF, which Pillow reads."""
    if head[4:8] != b"ftyp":
        return False
    brands = head[8 : int.from_bytes(head[:4], "big")]
    kinds = {brands[at : at + 4] for at in range(0, len(brands), 4)}
    return not kinds & {b"avif", b"avis"} and bool(
        kinds & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
    )


def _register_heif() -> bool:
    """Make Pillow read HEIC files; return False if pillow-heif is not installed."""
    if "HEIF" in Image.OPEN:
        return True
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@contextmanager
def _in_flight(pixels: int) -> Iterator[None]:
    """Wait until so many pixels may be decoded; an image above the whole limit goes alone."""
    global _pixels
    with _turn, _changed:
        _changed.wait_for(lambda: not _pixels or _pixels + pixels <= PIXELS_IN_FLIGHT)
        _pixels += pixels
    try:
        yield
    finally:
        with _changed:
            _pixels -= pixels
            _changed.notify_all()


def _lock_of(image: Image.Image) -> threading.Lock:
    """Return a lock that an image has always, and shares with few others."""
    return _locks[(id(image) >> 4) % len(_locks)]


def _make_locks() -> None:
    global _pixels, _turn, _changed, _locks
    _pixels = 0
    _turn = threading.Lock()  # those who wait do so in turn: large images are not passed forever
    _changed = threading.Condition()
    _locks = [threading.Lock() for _ in range(256)]


_make_locks()
# A child of a fork has none of the threads that hold its locks.
os.register_at_fork(after_in_child=_make_locks)
