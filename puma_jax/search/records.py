"""Records of what was read for an item, by which a rerun tells what has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from puma_jax.data.raw_items import RawItem, images_of
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
    """The first image of the item, which stands for it where one is shown."""
    more_images: tuple[ImageRecord, ...] = ()
    """The other images of the item, in order."""
    skipped: str | None = None
    """Why the item has no vector; None if it has one."""
    fields: dict[str, FieldValue] = field(default_factory=dict)
    """Further fields of the item, which do not change its vector."""

    @property
    def images(self) -> tuple[ImageRecord, ...]:
        """All images of the item, in order."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def content(self) -> list[str | None]:
        """Id, text and digests of the images: what decides the vector."""
        image = None if self.image is None else self.image.sha256
        more = [other.sha256 for other in self.more_images]
        return [self.id, self.text, image, self.skipped, *more]

    @property
    def digest(self) -> str:
        """Digest of the content and the further fields."""
        return sha256_of([*self.content, self.fields] if self.fields else self.content)

    def to_json(self) -> str:
        """Return one line of JSON without the fields that are empty."""
        values = asdict(self).items()
        fields = {name: value for name, value in values if value not in (None, {}, ())}
        return json.dumps(fields, ensure_ascii=False)


def record_item(
    identifier: str, item: RawItem, fields: Mapping[str, FieldValue] | None = None
) -> ItemRecord:
    """Return the record of an item whose images, if it has any, are files.

    Args:
        identifier: Id of the item.
        item: Its text and images.
        fields: Its further fields.

    Raises:
        ImageError: A file cannot be read.
    """
    images = [_record_image(Path(image)) for image in images_of(item)]  # a corpus names files
    return ItemRecord(
        identifier,
        item.get("text"),
        images[0] if images else None,
        tuple(images[1:]),
        fields=dict(fields or {}),
    )


def _record_image(path: Path) -> ImageRecord:
    try:
        found = Digest.of(path)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from None
    return ImageRecord(os.path.abspath(path), found.bytes, found.modified_ns, found.sha256)


def is_unchanged(record: ItemRecord, identifier: str, item: RawItem) -> bool:
    """Return whether an item is still what was recorded.

    A file whose path, size and time are those recorded is not read again; any other is, and
    compared by its SHA-256.
    """
    images = images_of(item)
    if (record.id, record.text, len(record.images)) != (
        identifier,
        item.get("text"),
        len(images),
    ):
        return False
    return all(map(_is_unchanged_image, record.images, images))


def _is_unchanged_image(record: ImageRecord, image: Any) -> bool:
    known = Digest(record.bytes, record.modified_ns, record.sha256)
    same_path = record.path == os.path.abspath(image)
    try:
        return Digest.of(Path(image), known if same_path else None).sha256 == known.sha256
    except OSError:
        return False
