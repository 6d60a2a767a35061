"""Pairs of queries and documents, with hard negatives, read from the columns of a table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from puma_jax.config import require
from puma_jax.data.lines import BadRecords, OnBadRecord, reject, resolve_inside
from puma_jax.data.mbeir.records import TASKS, Modality
from puma_jax.data.tabular import Table, is_on_hub, is_table, open_lines, open_table
from puma_jax.data.texts import is_blank
from puma_jax.errors import DataError
from puma_jax.schema import shown

_TASK_OF = {modalities: task for task, modalities in TASKS.items()}


@dataclass(frozen=True)
class PairColumns:
    """Columns of a table that make up pairs.

    If no column of queries and documents is named, they are those of NLI files for SimCSE: sent0,
    sent1 and, where it is there, hard_neg.
    """

    query: str | None = None
    """Column with the text of the query."""
    query_image: str | None = None
    """Column with the image of the query: a path, or a stored image."""
    document: str | None = None
    """Column with the text of the document that answers it."""
    document_image: str | None = None
    """Column with the image of that document."""
    negatives: tuple[str, ...] = ()
    """Columns with texts that do not answer the query: each row has one, or a list of them."""
    negative_images: tuple[str, ...] = ()
    """Columns with images that do not answer it. Beside texts, the first image belongs to the first
    text, and so on."""

    @property
    def named(self) -> tuple[str, ...]:
        """All columns that are named."""
        single = self.query, self.query_image, self.document, self.document_image
        return (*(name for name in single if name), *self.negatives, *self.negative_images)


class Part(NamedTuple):
    """A query or a document: a text, an image or both."""

    text: str | None
    image: Path | bytes | None = None
    """An existing file, or a stored image."""

    @property
    def modality(self) -> Modality:
        """The modality of the parts that are there."""
        if self.image is None:
            return "text"
        return "image,text" if self.text else "image"


class Pair(NamedTuple):
    """A query, a document that answers it, and documents that do not."""

    row: int
    """Number of the row, from 1."""
    task: int
    """Task of M-BEIR, by the modalities of query and document."""
    query: Part
    document: Part
    negatives: tuple[Part, ...] = ()


class PairTable:
    """A table whose rows are pairs."""

    def __init__(self, source: Path, columns: PairColumns, images: Path | None = None):
        """Open a table.

        Args:
            source: A file of JSON lines, a CSV, TSV or parquet file, or a dataset; see
                `tabular.open_table`.
            columns: Names of its columns.
            images: Folder that holds the images, and that their paths are relative to; that of the
                file by default.

        Raises:
            ConfigError: Columns are named for one side only, or a package is not installed.
            DataError: The table cannot be read, or lacks a column.
        """
        self._root = images if images is not None else source.parent
        sides = (
            ("query", (columns.query, columns.query_image)),
            ("document", (columns.document, columns.document_image)),
        )
        unnamed = not any(name for _, names in sides for name in names)
        negatives = columns.negatives
        if unnamed:
            columns = replace(
                columns, query="sent0", document="sent1", negatives=negatives or ("hard_neg",)
            )
        self._table = _open(source, columns)
        there = self._table.names
        if unnamed and not negatives and "hard_neg" not in there:
            columns = replace(columns, negatives=())
        for side, names in sides:
            require(
                unnamed or any(names),
                f"no column holds the {side}: name one with --{side} or --{side}-image",
            )
        for name in columns.named:
            if name not in there:
                listed = ", ".join(map(shown, there)) or "none"
                raise DataError(
                    f"{source}: no column {shown(name)}; columns are {listed}: name those of the "
                    "pairs with --query, --document, --query-image and --document-image"
                )
        self.columns = columns
        self.fingerprint = self._table.fingerprint
        self.unused = [name for name in there if name not in columns.named]
        """Columns that are not read."""
        self.unused += self._table.left_out

    def pairs(
        self, on_bad_record: OnBadRecord = "error", skipped: BadRecords | None = None
    ) -> Iterator[Pair]:
        """Yield the pairs in order; a bad row is an error, or left out and counted.

        Raises:
            DataError: A row is bad, and `on_bad_record` is "error".
        """
        for number in range(len(self._table)):
            try:
                row = self._table.row(number)
            except DataError as error:  # which names its place
                reject(error, on_bad_record, skipped)
                continue
            try:
                yield self._pair(number + 1, row)
            except DataError as error:
                place = self._table.place(number)
                reject(DataError(f"{place}: {error}"), on_bad_record, skipped)

    def _pair(self, number: int, row: Mapping[str, Any]) -> Pair:
        columns = self.columns
        query = self._part(row, columns.query, columns.query_image)
        document = self._part(row, columns.document, columns.document_image)
        task = _TASK_OF.get((query.modality, document.modality))
        if task is None:
            raise DataError(
                f"a query of {query.modality} and a document of {document.modality} make no task: "
                "give the query a text, or leave the text of the document out"
            )
        return Pair(number, task, query, document, tuple(self._negatives(row)))

    def _part(self, row: Mapping[str, Any], text: str | None, image: str | None) -> Part:
        part = Part(
            None if text is None else _text(text, row.get(text)),
            None if image is None else self._image(image, row.get(image)),
        )
        if part.text is None and part.image is None:
            raise DataError(f"{' and '.join(name for name in (text, image) if name)} is empty")
        return part

    def _negatives(self, row: Mapping[str, Any]) -> Iterator[Part]:
        columns = self.columns
        texts = [
            text
            for name in columns.negatives
            for value in _listed(row.get(name))
            if (text := _text(name, value)) is not None
        ]
        images = [
            image
            for name in columns.negative_images
            for value in _listed(row.get(name))
            if (image := self._image(name, value)) is not None
        ]
        if not columns.negatives or not columns.negative_images:
            yield from (Part(text) for text in texts)
            yield from (Part(None, image) for image in images)
        elif len(texts) == len(images):
            yield from map(Part, texts, images)
        else:
            raise DataError(
                f"{len(texts)} texts and {len(images)} images of negatives, expected as many: each "
                "negative is a text with an image"
            )

    def _image(self, column: str, value: Any) -> Path | bytes | None:
        if isinstance(value, Mapping):  # how datasets store images: their bytes, or where they are
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) or not value:
            return value or None
        if not isinstance(value, str):
            raise DataError(f"{column} {shown(value)} is not a path or a stored image")
        below = value
        if os.path.isabs(value):
            below = os.path.relpath(os.path.realpath(value), os.path.realpath(self._root))
        path = resolve_inside(self._root, below)
        if not path.is_file():
            raise DataError(f"{column} {shown(value)} is not a file in {self._root}")
        return path


def _open(source: Path, columns: PairColumns) -> Table:
    if is_table(source):
        return open_table(source, columns.named)
    if is_on_hub(source) or source.is_dir():
        raise DataError(f"{source} is a folder, expected a file or a dataset")
    return open_lines(source)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(column: str, value: Any) -> str | None:
    """Return a text without white space around it; None for one that leaves nothing."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{column} {shown(value)} is not a text")
    return None if is_blank(value) else value.strip()
