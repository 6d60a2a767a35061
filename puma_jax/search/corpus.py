"""Open a corpus to embed: JSON lines, a table, a pool in M-BEIR layout, or a folder of images.

Items are read when needed. Memory holds an offset for each line of a file, or a name for each
image of a folder: list tens of millions of photos in a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from puma_jax.data.decode import image_suffixes, is_image
from puma_jax.data.lines import FilePath, RowIndex, json_object, resolve_inside
from puma_jax.data.mbeir import parse_candidate
from puma_jax.data.tabular import is_on_hub, is_table, open_table
from puma_jax.embedder import RawItem
from puma_jax.errors import DataError
from puma_jax.files import sha256
from puma_jax.schema import shown
from puma_jax.search.fields import ITEM_FIELDS, FieldValue, read_fields


class CorpusItem(NamedTuple):
    """An item of a corpus."""

    id: str
    item: RawItem
    """Its text, its image or both: what is embedded."""
    fields: dict[str, FieldValue] = {}  # noqa: RUF012 (never changed)
    """Further fields, which are kept beside the vector."""


_NOT_IN_IDS = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories: control characters, surrogates, ends of lines and of paragraphs."""
_KINDS_SHOWN = 10
_LOOKED_AT = 100


@dataclass(frozen=True)
class Columns:
    """Names of the fields of JSON lines, or of the columns of a table, that make up an item."""

    id: str = "id"
    """Name of the field or column that holds the id of an item."""
    text: str = "text"
    """Name of the field or column that holds the text of an item."""
    image: str = "image"
    """Name of the field or column that holds the image of an item: a path, a stored image, or a
    list of them."""


_DEFAULT = Columns()


@dataclass(frozen=True)
class Corpus:
    """Numbered items, each with an id."""

    source: Path
    items: int
    read: Callable[[int], CorpusItem]
    """Returns the item of a number; raises DataError for a bad record."""
    fingerprint: str
    """SHA-256 of the file, or of the names and sizes of all images; of a dataset its own."""
    passed_over: str = ""
    """One line on what is not read: other files of a folder, columns of a table; or empty."""

    @property
    def address(self) -> str:
        """Absolute path of the source, or the name of a dataset on the hub."""
        return str(self.source) if is_on_hub(self.source) else os.path.abspath(self.source)

    def notes(self) -> list[str]:
        """Return lines on what is not embedded: what is not read, and the fields that are kept."""
        names: dict[str, None] = {}
        for number in range(min(self.items, _LOOKED_AT)):
            with contextlib.suppress(DataError):  # told when the item is read
                names |= dict.fromkeys(self.read(number).fields)
        lines = [self.passed_over] * bool(self.passed_over)
        return lines + [f"Kept as fields, not embedded: {', '.join(names)}"] * bool(names)


def open_corpus(
    source: FilePath, images: FilePath | None = None, columns: Columns = _DEFAULT
) -> Corpus:
    """Return the corpus in a file, a folder or a dataset.

    A file of JSON lines holds `{"id": ..., "text": ..., "image": ...}`, with a text, the path of
    an image or both, and any further fields that filters can name; see `fields.read_fields`. The
    image may be a list: an item of several images. A table has such columns; see
    `tabular.open_table`. A file may also hold the documents of a pool in M-BEIR layout, recognized
    by their "did". A folder gives all images in it and below it, behind links too; an image's id is
    its path. Images are files with a suffix of an image format, and files without a suffix that
    begin as one.

    Args:
        source: A file, a folder, or "hf:NAME" for a dataset on the hub of Hugging Face.
        images: Folder that holds the images of a file, and that their paths are relative to. A
            path that leads out of it is an error. The default is the root of the benchmark for a
            pool in M-BEIR layout, and the folder of the file for others.
        columns: Names of fields or columns, where they are others.

    Raises:
        ConfigError: A package that reads it is not installed.
        DataError: The file or folder does not exist, or holds no items.
    """
    source = Path(source)
    if is_table(source):
        return _table(source, Path(images) if images is not None else source.parent, columns)
    if source.is_dir():
        if columns != _DEFAULT:
            raise DataError(f"{source} is a folder of images, which has no columns to name")
        return _images(source)
    if not source.is_file():
        raise DataError(
            f"{source} is neither a file of JSON lines, a table, nor a folder of images"
        )
    root = Path(images) if images is not None else _root(source)

    def parse(line: bytes) -> CorpusItem:
        row = json_object(line)
        if "did" in row and columns.id not in row:
            if columns != _DEFAULT:
                raise DataError("a pool in M-BEIR layout has no columns to name")
            candidate = parse_candidate(line)
            images = [candidate.image] if candidate.image else []
            return CorpusItem(candidate.did, _item(root, candidate.text, images))
        return _parse_item(row, root, columns)

    rows = RowIndex(source, parse)
    if not len(rows):
        raise DataError(f"{source} holds no items")
    return Corpus(source, len(rows), rows.__getitem__, sha256(source))


def _table(source: Path, root: Path, columns: Columns) -> Corpus:
    """Return the corpus in a table, whose images are stored in it or lie below a root."""
    table = open_table(source, astuple(columns))
    asked = [name for name in astuple(columns) if name not in table.names]
    there = ", ".join(map(shown, table.names)) or "none"
    for option, name in asdict(columns).items():
        if name in asked and (option == "id" or name != getattr(_DEFAULT, option)):
            raise DataError(
                f"{source} has no column {shown(name)}; columns are {there}: name the one that "
                f"holds the {option} with --{option}"
            )
    if len(asked) > 1:
        raise DataError(
            f"{source} has neither a column {shown(columns.text)} nor {shown(columns.image)}; "
            f"columns are {there}: name one with --text or --image"
        )
    if not len(table):
        raise DataError(f"{source} holds no items")

    def read(number: int) -> CorpusItem:
        row = table.row(number)
        # Numbers name items, too; in texts of CSV files they are texts already.
        if isinstance(row[columns.id], int):
            row[columns.id] = str(row[columns.id])
        try:
            return _parse_item(row, root, columns)
        except DataError as error:
            raise DataError(f"{source}, row {number + 1}: {error}") from None

    note = f"Columns left out of {source}: {', '.join(table.left_out)}" if table.left_out else ""
    return Corpus(source, len(table), read, table.fingerprint, note)


def _parse_item(row: Mapping[str, Any], root: Path, columns: Columns) -> CorpusItem:
    """Return the item of a row of a table, or of a line of JSON."""
    identifier, text, image = (row.get(name) for name in astuple(columns))
    rest = {name: value for name, value in row.items() if name not in astuple(columns)}
    for name in ITEM_FIELDS:
        if name in rest:
            raise DataError(
                f"field {shown(name)} is not the {name} of the item, which is in "
                f"{shown(getattr(columns, name))}: rename one of them"
            )
    fields = read_fields(rest, [name for name in astuple(columns) if not row.get(name)])
    for name, value in ((columns.id, identifier), (columns.text, text)):
        if not isinstance(value, str | None):
            raise DataError(f"{name} {shown(value)} is not a text")
    if not identifier:
        raise DataError(f"{columns.id} is missing, expected a text that names the item")
    _check_id(identifier)
    images = [_read_image(one, columns) for one in (image if isinstance(image, list) else [image])]
    if isinstance(image, list) and not all(images):
        raise DataError(f"{columns.image} {shown(image)} holds an empty image, expected a path")
    if not text and not any(images):
        raise DataError("there is neither text nor image")
    return CorpusItem(identifier, _item(root, text, [one for one in images if one]), fields)


def _read_image(image: Any, columns: Columns) -> str | bytes | None:
    """Return the path of an image, or the bytes of a stored one; None if it is missing."""
    if isinstance(image, Mapping):  # how datasets store images: their bytes, or where they are
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | bytes | None):
        raise DataError(f"{columns.image} {shown(image)} is not a path or a stored image")
    return image


def _images(folder: Path) -> Corpus:
    """Return the images below a folder, in the order of their paths."""
    sizes, passed_over = _walk(folder)
    if not sizes:
        raise DataError(f"{folder} holds no images{_counted(passed_over, '; it holds ')}")
    names = sorted(sizes)
    digest = hashlib.sha256()
    for name in names:
        digest.update(b"%b\n%d\n" % (os.fsencode(name), sizes[name]))

    def read(number: int) -> CorpusItem:
        try:
            _check_id(names[number])
        except DataError as error:
            raise DataError(f"{folder}: {error}: rename the file") from None
        return CorpusItem(names[number], {"image": folder / names[number]})

    note = _counted(passed_over, f"Passed over in {folder}: ")
    return Corpus(folder, len(names), read, digest.hexdigest(), note)


def _walk(folder: Path) -> tuple[dict[str, int], Counter[str]]:
    """Return the sizes of the images below a folder by name, and the counts of what is no image.

    Links to folders are followed, after all folders that are no links, so that an image has its
    own path for an id. Every folder is read once, whichever links lead to it.
    """
    suffixes = image_suffixes()
    sizes: dict[str, int] = {}
    passed_over: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        prefix = folders.pop()
        try:
            status = os.stat(folder / prefix)
            entries = sorted(os.scandir(folder / prefix), key=lambda entry: entry.name)
        except OSError:
            passed_over["unreadable folders"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            passed_over["links to folders that are read already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = f"{prefix}{entry.name}"
            try:
                status = entry.stat()
            except OSError:  # also where links lead to each other in a circle
                passed_over["broken links" if entry.is_symlink() else "unreadable files"] += 1
                continue
            if stat.S_ISDIR(status.st_mode):
                (links if entry.is_symlink() else folders).append(f"{name}/")
            elif kind := _other_kind(entry, status.st_mode, suffixes):
                passed_over[kind] += 1
            else:
                sizes[name] = status.st_size
    return sizes, passed_over


def _other_kind(entry: os.DirEntry[str], mode: int, suffixes: set[str]) -> str | None:
    """Return what a file is that is no image to embed; None for an image."""
    if entry.name.startswith("."):
        return "hidden files"
    if not stat.S_ISREG(mode):
        return "pipes, sockets and devices"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in suffixes or (not suffix and is_image(entry.path)):
        return None
    return suffix or "files without a suffix that are no images"


def _counted(passed_over: Counter[str], start: str) -> str:
    """Return what was passed over in one line, the most frequent first; empty for nothing."""
    if not passed_over:
        return ""
    most = sorted(passed_over.items(), key=lambda count: (-count[1], count[0]))
    parts = [
        f"{kind if kind.isprintable() else ascii(kind)} ({count:,})"
        for kind, count in most[:_KINDS_SHOWN]
    ]
    if rest := sum(count for _, count in most[_KINDS_SHOWN:]):
        parts.append(f"others ({rest:,})")
    heic = passed_over.keys() & {".heic", ".heif", ".hif"}
    hint = "; HEIC needs pip install pillow-heif" if heic else ""
    return f"{start}{', '.join(parts)}{hint}"


def _check_id(identifier: str) -> None:
    """Refuse an id that does not fit on one line of ids.txt, or cannot be written there."""
    if any(unicodedata.category(character) in _NOT_IN_IDS for character in identifier):
        raise DataError(
            f"id {shown(identifier)} holds control characters or invalid Unicode, expected one line"
        )


def _item(root: Path, text: str | None, images: Sequence[str | bytes]) -> RawItem:
    """Return an item, whose images are stored in its row or lie below the root, links followed.

    Raises:
        DataError: An image is elsewhere.
    """
    found: list[Path | bytes] = []
    for image in images:
        if isinstance(image, bytes):
            found.append(image)
            continue
        absolute = os.path.isabs(image)
        below = os.path.relpath(os.path.realpath(image), os.path.realpath(root))
        resolve_inside(root, below if absolute else image)
        found.append(root / image)
    item: dict[str, Any] = {"text": text} if text else {}
    if found:
        item["image"] = found[0] if len(found) == 1 else found
    return item


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
