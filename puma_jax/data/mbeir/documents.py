"""What a record names: the document behind an id, the image behind a path.

Validation, building and evaluation share these rules, so that what one of them takes, all take.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from puma_jax.data.images import open_image
from puma_jax.data.lines import FilePath, reading, resolve_inside
from puma_jax.data.mbeir.records import Candidate, content_key
from puma_jax.errors import DataError, ImageError
from puma_jax.schema import shown

MAX_IMAGE_BYTES = 1 << 28
"""A larger image file is refused unread."""


class Documents:
    """Documents by id: an id names one document, whatever the number of lines that hold it.

    Ids may be numbered before their documents are read. The 5.6 million documents of M-BEIR take
    about 1 GB.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        """The number of each id, in the order in which ids were first met."""
        self._paths: list[Path] = []
        self._keys, self._files, self._lines = array("Q"), array("i"), array("q")

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, did: str) -> bool:
        """Whether a document of this id has been read."""
        number = self.numbers.get(did)
        return number is not None and self._files[number] >= 0

    def number(self, did: str) -> int:
        """Return the number of an id, which is new or known."""
        number = self.numbers.setdefault(did, len(self.numbers))
        if number == len(self._keys):
            self._keys.append(0)
            self._files.append(-1)
            self._lines.append(0)
        return number

    def add(self, candidate: Candidate, path: Path, line: int) -> bool:
        """Take in the document of a line; return False if an earlier line holds it, too.

        Raises:
            DataError: An earlier line, of this or another file, gives the id to another document.
        """
        number = self.number(candidate.did)
        key = content_key(candidate.text, candidate.image)
        file = self._files[number]
        if file < 0:
            if path not in self._paths[-1:]:
                self._paths.append(path)
            self._files[number] = len(self._paths) - 1
            self._keys[number], self._lines[number] = key, line
            return True
        if self._keys[number] != key:
            raise DataError(
                f"did {shown(candidate.did)} is another document in {self._paths[file].name}:"
                f"{self._lines[number]}: give every document an id of its own"
            )
        return False


class ImageFile(NamedTuple):
    """The file of an image and what it shows."""

    content: bytes
    image: Image.Image


def read_image(root: FilePath, name: str, path: str) -> ImageFile:
    """Return the image that a record names, decoded, and the bytes of its file.

    Args:
        root: Root of the benchmark.
        name: Name of the field, for messages.
        path: Its value.

    Raises:
        ImageError: The path leads out of the root, there is no such file, or it cannot be decoded.
    """
    try:
        file = resolve_inside(root, path)
        with reading(Path(path)):
            size = file.stat().st_size
            if not file.is_file() or size > MAX_IMAGE_BYTES:
                what = f"has {size:,} bytes" if file.is_file() else "is no regular file"
                limit = f"a file of at most {MAX_IMAGE_BYTES:,} bytes"
                raise ImageError(f"{path} {what}, expected {limit}")
            content = file.read_bytes()
    except (DataError, ImageError) as error:
        raise ImageError(f"{name} {error}") from None
    try:
        return ImageFile(content, open_image(content))
    except ImageError as error:
        raise ImageError(f"{name} {path} {str(error).removeprefix('image ')}") from error
