"""Records of what was read for an item, by which a rerun tells what has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from puma_jax.embedder import RawItem
from puma_jax.errors import ImageError
from puma_jax.files import Digest, sha256_of
from puma_jax.schema import CountOrZero
from puma_jax.search.fields import FieldValue


@dataclass(frozen=True)
class ImageRecord:
    """An image file as it was read."""

    path: str
    bytes: CountOrZero
    modified_ns: int
    sha256: str


@dataclass(frozen=True)
class ItemRecord:
    """An item as it was read."""

    id: str
    """Id of the item; empty if its line could not be read."""
    text: str | None = None
    image: ImageRecord | None = None
    skipped: str | None = None
    """Why the item has no vector; None if it has one."""
    fields: dict[str, FieldValue] = field(default_factory=dict)
    """Further fields of the item, which do not change its vector."""

    @property
    def content(self) -> list[str | None]:
        """Id, text and digest of the image: what decides the vector."""
        image = None if self.image is None else self.image.sha256
        return [self.id, self.text, image, self.skipped]

    @property
    def digest(self) -> str:
        """Digest of the content and the further fields."""
        return sha256_of([*self.content, self.fields] if self.fields else self.content)

    def to_json(self) -> str:
        """Return one line of JSON without the fields that are empty."""
        fields = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        return json.dumps(fields, ensure_ascii=False)


def record_item(
    identifier: str, item: RawItem, fields: Mapping[str, FieldValue] | None = None
) -> ItemRecord:
    """Return the record of an item whose image, if it has one, is a file.

    Args:
        identifier: Id of the item.
        item: Its text and image.
        fields: Its further fields.

    Raises:
        ImageError: The file cannot be read.
    """
    image = item.get("image")
    fields = dict(fields or {})
    if image is None:
        return ItemRecord(identifier, item.get("text"), fields=fields)
    path = Path(image)  # type: ignore[arg-type]  # a corpus names files
    try:
        found = Digest.of(path)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from None
    absolute = os.path.abspath(path)
    return ItemRecord(
        identifier,
        item.get("text"),
        ImageRecord(absolute, found.bytes, found.modified_ns, found.sha256),
        fields=fields,
    )


def is_unchanged(record: ItemRecord, identifier: str, item: RawItem) -> bool:
    """Return whether an item is still what was recorded.

    A file whose path, size and time are those recorded is not read again; any other is, and
    compared by its SHA-256.
    """
    image: Any = item.get("image")
    if (record.id, record.text, record.image is None) != (
        identifier,
        item.get("text"),
        image is None,
    ):
        return False
    if record.image is None:
        return True
    known = Digest(record.image.bytes, record.image.modified_ns, record.image.sha256)
    same_path = record.image.path == os.path.abspath(image)
    try:
        return Digest.of(Path(image), known if same_path else None).sha256 == known.sha256
    except OSError:
        return False
