"""Tables, read by row: CSV and parquet files, JSON lines, and datasets of Hugging Face.

A row is a dictionary of plain values: texts, numbers, true or false, lists of these, and images as
a path, as bytes, or as both. Columns of other types are left out, and listed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import weakref
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from puma_jax.data.arrow import DatasetTable, ParquetTable
from puma_jax.data.lines import (
    MAX_LINE_BYTES,
    RowIndex,
    decode_line,
    json_object,
    located,
    numbered_lines,
    reading,
)
from puma_jax.errors import DataError
from puma_jax.files import sha256

_HUB = "hf:"
_LOOKED_AT = 100
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")
_BOOLEANS = {"true": True, "false": False}


@runtime_checkable
class Table(Protocol):
    """Rows with named columns. Several threads may read at once."""

    names: list[str]
    left_out: list[str]
    """Columns that are not read, each with its type."""
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def row(self, number: int) -> dict[str, Any]:
        """Return the values of a row by column; those that are missing are None.

        Raises:
            DataError: The row is bad, or can no longer be read.
        """
        ...

    def place(self, number: int) -> str:
        """Return where a row stands, for messages."""
        ...


def is_table(source: Path) -> bool:
    """Whether a source of items is a table: by its suffix, or as a dataset of Hugging Face."""
    if source.is_dir():
        return any((source / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return is_on_hub(source) or source.suffix.lower() in (*_DELIMITERS, ".parquet")


def is_on_hub(source: Path) -> bool:
    """Whether a source of items is a dataset on the hub of Hugging Face."""
    return str(source).startswith(_HUB)


def open_table(source: Path, texts: Collection[str]) -> Table:
    """Return the table in a file that ends in .csv, .tsv or .parquet, or in a dataset.

    Args:
        source: A file; a folder that `Dataset.save_to_disk` wrote; or "hf:NAME" for a dataset on
            the hub, with the split behind it, as in "hf:user/photos:test".
        texts: Columns that are texts in a CSV file whatever they look like.

    Raises:
        ConfigError: The package that reads it is not installed.
        DataError: It cannot be read, or does not name its columns.
    """
    suffix = source.suffix.lower()
    if source.is_dir() or is_on_hub(source):
        return DatasetTable(str(source).removeprefix(_HUB), texts)
    return ParquetTable(source, texts) if suffix == ".parquet" else _Csv(source, texts)


def open_lines(path: Path) -> Table:
    """Return the table in a file of JSON lines, whose columns are the keys of the first objects.

    Raises:
        DataError: The file cannot be read.
    """
    return _Lines(path)


class _Lines:
    """A file of JSON lines; memory holds the place of each line."""

    def __init__(self, path: Path):
        self._rows = RowIndex(path, json_object)
        self.left_out: list[str] = []
        names: dict[str, None] = {}
        for number in range(min(len(self._rows), _LOOKED_AT)):
            with contextlib.suppress(DataError):  # told when the row is read
                names |= dict.fromkeys(self._rows[number])
        self.names = [*names]
        with reading(path):
            self.fingerprint = sha256(path)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        """Return the object of a line."""
        return self._rows[number]

    def place(self, number: int) -> str:
        """Return the file and the line of a row."""
        return f"{self._rows.path.name}:{self._rows.line_numbers[number]}"


class _Csv:
    """A CSV file; memory holds the place of each row.

    A column whose cells are all numbers, or all true or false, is read as such; numbers that begin
    with a zero are texts. Empty cells are missing.
    """

    def __init__(self, path: Path, texts: Collection[str]):
        self.path, self._delimiter = path, _DELIMITERS[path.suffix.lower()]
        # The limit is that of the whole process, 128 KiB by default.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        records = self._records()
        number, _, header = next(records, (1, 0, b""))
        self._header = self._cells(header, number)
        self.names = [name for name in self._header if name]
        if not self.names or len({*self.names}) < len(self.names):
            problem = "the first row must give each column a name of its own"
            raise located(DataError(problem), path, number)
        unnamed = [place for place, name in enumerate(self._header, 1) if not name]
        self.left_out = [f"column {place} (without a name)" for place in unnamed]
        kinds: dict[str, set[type]] = {
            name: set() if name in texts else {int, float, bool} for name in self.names
        }
        starts, lines = array("q"), array("q")
        for number, start, content in records:
            starts.append(start)
            lines.append(number)
            try:
                cells = self._cells(content, number)
            except DataError:
                continue  # told when the row is read
            for name, cell in zip(self._header, cells, strict=False):
                if name and cell and kinds[name]:
                    kinds[name] &= _kinds(cell)
        self._kinds = kinds
        with reading(path):
            starts.append(path.stat().st_size)
            self.fingerprint = sha256(path)
            self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._starts, self._lines = np.array(starts, np.int64), np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, number: int) -> dict[str, Any]:
        """Return the values of a row by column."""
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        with reading(self.path):
            content = os.pread(self._descriptor, min(end - start, MAX_LINE_BYTES + 1), start)
        line = int(self._lines[number])
        cells = self._cells(content, line)
        if len(cells) != len(self._header):
            problem = f"{len(cells)} columns, but the first row names {len(self._header)}"
            raise located(DataError(problem), self.path, line)
        named = zip(self._header, cells, strict=True)
        return {name: _typed(cell, self._kinds[name]) for name, cell in named if name}

    def place(self, number: int) -> str:
        """Return the file and the line of a row."""
        return f"{self.path.name}:{self._lines[number]}"

    def _records(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield the first line number, the place and the bytes of every row that is not blank."""
        held: list[bytes] = []
        start = number = size = marks = 0
        for line in numbered_lines(self.path):
            if not held:
                if line.content.isspace():
                    continue
                start, number, size, marks = line.start, line.number, 0, 0
            held.append(line.content)
            size += len(line.content)
            marks += line.content.count(b'"')
            # A quotation mark that is open runs on in the next line.
            if marks % 2 == 0 or size > MAX_LINE_BYTES:
                yield number, start, b"".join(held)
                held = []
        if held:
            yield number, start, b"".join(held)

    def _cells(self, content: bytes, number: int) -> list[str]:
        try:
            text = io.StringIO(decode_line(content), newline="")
            return next(csv.reader(text, delimiter=self._delimiter, strict=True), [])
        except DataError as error:
            raise located(error, self.path, number) from None
        except csv.Error as error:
            raise located(DataError(f"not CSV: {error}"), self.path, number) from None


def _kinds(cell: str) -> set[type]:
    """Return what a cell may be besides a text."""
    if _INTEGER.fullmatch(cell):
        return {int, float}
    if _NUMBER.fullmatch(cell):
        return {float}
    return {bool} if cell.lower() in _BOOLEANS else set()


def _typed(cell: str, kinds: set[type]) -> Any:
    """Return the value of a cell of a column that may be of these kinds."""
    if not cell:
        return None
    if int in kinds:
        return int(cell)
    if float in kinds:
        return float(cell)
    return _BOOLEANS[cell.lower()] if bool in kinds else cell
