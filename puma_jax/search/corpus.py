"""Open a corpus to embed: a pool in M-BEIR layout, JSON lines of items, or a folder of images.

Items are read when needed. Memory holds an offset for each line of a file, or a name for each
image of a folder: list tens of millions of photos in a file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from puma_jax.data.lines import FilePath, RowIndex, json_object, shown
from puma_jax.data.mbeir import parse_candidate
from puma_jax.embedder import RawItem
from puma_jax.errors import DataError
from puma_jax.files import sha256

Named = tuple[str, RawItem]
"""An id and its item."""

_FIELDS = {"id", "text", "image"}


@dataclass(frozen=True)
class Corpus:
    """Numbered items, each with an id."""

    source: Path
    items: int
    read: Callable[[int], Named]
    """Returns the id and item of a number; raises DataError for a bad record."""
    fingerprint: str
    """SHA-256 of the file, or of the names and sizes of all images."""


def open_corpus(source: FilePath, images: FilePath | None = None) -> Corpus:
    """Return the corpus in a file or a folder.

    A file of JSON lines holds `{"id": ..., "text": ..., "image": ...}`, with a text, the path of
    an image or both; or the documents of a pool in M-BEIR layout, recognized by their "did". A
    folder gives all images in it and below it; an image's id is its path.

    Args:
        source: A file or a folder.
        images: Folder that image paths in a file are relative to. The default is the root of the
            benchmark for a pool in M-BEIR layout, and the folder of the file for others.

    Raises:
        DataError: The file or folder does not exist, or holds no items.
    """
    source = Path(source)
    if source.is_dir():
        return _images(source)
    if not source.is_file():
        raise DataError(f"{source} is neither a file of JSON lines nor a folder of images")
    root = Path(images) if images is not None else _root(source)

    def parse(line: bytes) -> Named:
        if "did" in json_object(line):
            candidate = parse_candidate(line)
            return candidate.did, raw_item(root, candidate.text, candidate.image)
        return _parse_item(line, root)

    rows = RowIndex(source, parse)
    if not len(rows):
        raise DataError(f"{source} holds no items")
    return Corpus(source, len(rows), rows.__getitem__, sha256(source))


def _parse_item(line: bytes, root: Path) -> Named:
    """Return the id and the item of a line; unknown fields are refused as likely misspellings."""
    row = json_object(line)
    if unknown := sorted(set(row) - _FIELDS):
        raise DataError(
            f"field {shown(unknown[0])} is not one of {', '.join(sorted(_FIELDS))}, and there is "
            "no did, which the documents of an M-BEIR pool have"
        )
    for name, value in row.items():
        if not isinstance(value, str | None):
            raise DataError(f"{name} {shown(value)} is not a text")
    identifier = row.get("id")
    if not identifier:
        raise DataError("id is missing, expected a text that names the item")
    _check_id(identifier)
    if not row.get("text") and not row.get("image"):
        raise DataError("there is neither text nor image")
    return identifier, raw_item(root, row.get("text"), row.get("image"))


def _images(folder: Path) -> Corpus:
    """Return the corpus of the images below a folder, in the order of their paths."""
    suffixes = Image.registered_extensions()
    names, digest = [], hashlib.sha256()
    for parent, folders, files in os.walk(folder):
        folders.sort()
        below = Path(parent).relative_to(folder)
        names += [
            (below / file).as_posix()
            for file in files
            if not file.startswith(".") and Path(file).suffix.lower() in suffixes
        ]
    if not names:
        raise DataError(f"{folder} holds no images")
    names.sort()
    for name in names:
        _check_id(name)
        digest.update(f"{name}\n{(folder / name).stat().st_size}\n".encode())
    return Corpus(
        folder,
        len(names),
        lambda number: (names[number], {"image": folder / names[number]}),
        digest.hexdigest(),
    )


def _check_id(identifier: str) -> None:
    """Refuse an id that does not fit on one line of ids.txt."""
    if "\n" in identifier or not identifier.isprintable():
        raise DataError(f"id {shown(identifier)} holds what cannot be printed, expected one line")


def raw_item(root: Path, text: str | None, image: str | None) -> RawItem:
    """Return the item with a text, an image whose path is relative to a root, or both."""
    fields = {"text": text, "image": image and root / image}
    return {name: value for name, value in fields.items() if value}


def _root(source: Path) -> Path:
    """Return the root of the benchmark that holds a pool, or the folder of another file."""
    for folder in source.absolute().parents:
        if folder.name == "cand_pool":
            return folder.parent
    return source.parent
