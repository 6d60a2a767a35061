"""Files with one record per line: read as a stream or by row, written completely or not at all.

Whatever a file holds, the only error raised is a `DataError` of one line that starts with the name
of the file and the number of the line.
"""

from __future__ import annotations

import codecs
import json
import os
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, SupportsIndex, TypeVar

import numpy as np

from puma_jax.artifacts import atomic_file
from puma_jax.errors import DataError
from puma_jax.files import DECODER
from puma_jax.schema import shown
from puma_jax.typing import Int, ndarray

FilePath = str | os.PathLike[str]
OnBadRecord = Literal["error", "skip"]
Record = TypeVar("Record")

MAX_LINE_BYTES = 1 << 26
"""A longer line is a bad record. No more than this is ever read of a line into memory."""


@dataclass
class BadRecords:
    """The count and the first messages of the records that `on_bad_record="skip"` skips."""

    keep: int = 10
    """Number of messages to keep; later ones are only counted."""
    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """Count one bad record."""
        self.count += 1
        if len(self.messages) < self.keep:
            self.messages.append(message)


class Line(NamedTuple):
    """One line of a file."""

    number: int
    """Line number, from 1."""
    start: int
    """Offset of the line in the file, in bytes."""
    content: bytes
    """The bytes with their newline; `MAX_LINE_BYTES` + 1 bytes if the line is too long."""


def numbered_lines(path: FilePath) -> Iterator[Line]:
    """Yield every line of a file. A byte order mark at the start of the file is skipped.

    Raises:
        DataError: The file does not exist or cannot be read.
    """
    with reading(path), open(path, "rb") as file:
        start = len(codecs.BOM_UTF8)
        if file.read(start) != codecs.BOM_UTF8:
            start = 0
        file.seek(start)
        number = 1
        while content := file.readline(MAX_LINE_BYTES + 1):
            yield Line(number, start, content)
            start += len(content)
            while content and not content.endswith(b"\n"):  # the rest of a line that is too long
                content = file.readline(MAX_LINE_BYTES)
                start += len(content)
            number += 1


def read_records(
    path: FilePath,
    parse: Callable[[bytes], Record | None],
    *,
    on_bad_record: OnBadRecord = "error",
    skipped: BadRecords | None = None,
) -> Iterator[Record]:
    """Yield the record of every line that is not blank.

    Args:
        path: The file.
        parse: Returns the record of a line, or None for a line without a record. It raises
            DataError, to which file name and line number are added.
        on_bad_record: "error" stops at a bad record, "skip" continues with the next one.
        skipped: Counts the skipped records.

    Raises:
        DataError: The file cannot be read, or a record is bad and `on_bad_record` is "error".
    """
    for line in numbered_lines(path):
        if line.content.isspace():
            continue
        try:
            record = parse(line.content)
        except DataError as error:
            reject(located(error, path, line.number), on_bad_record, skipped)
            continue
        if record is not None:
            yield record


def reject(error: DataError, on_bad_record: OnBadRecord, skipped: BadRecords | None) -> None:
    """Raise the error of a bad record, or count it."""
    if on_bad_record != "skip":
        raise error from None
    if skipped is not None:
        skipped.add(str(error))


def located(error: Exception, path: FilePath, number: int) -> DataError:
    """Return the error with its place, "file:line: ", before the message."""
    return DataError(f"{Path(path).name}:{number}: {error}")


def decode_line(content: bytes) -> str:
    """Return the text of a line.

    Raises:
        DataError: The line is too long, holds a NUL byte, or is not UTF-8.
    """
    if len(content) > MAX_LINE_BYTES:
        raise DataError(f"line is longer than {MAX_LINE_BYTES} bytes")
    if b"\0" in content:
        raise DataError("line holds a NUL byte; the file is damaged or not a text file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} of the line, 0x{content[error.start]:02x}, is not UTF-8"
        ) from None


def json_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object that a line holds.

    Raises:
        DataError: The line is not UTF-8, not JSON or not an object, or it gives a key twice.
    """
    try:
        value = DECODER.decode(decode_line(content).rstrip())
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} (column {error.pos + 1})") from None
    except RecursionError:
        raise DataError("not JSON: nested too deeply") from None
    except ValueError as error:  # ours, from below, and Python's limit on the digits of a number
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{shown(value)} is not an object {{...}}")
    return value


def resolve_inside(root: FilePath, path: str) -> Path:
    """Return the file below a folder that a relative path names, links followed.

    Data from others must not read what lies elsewhere on this machine. A path is taken if it is
    relative and its target, after all links, lies in the folder; the folder itself may be a link.

    Raises:
        DataError: The path is absolute, or it leads out of the folder.
    """
    folder = os.path.realpath(root)
    target = os.path.realpath(os.path.join(folder, path))
    if os.path.isabs(path) or not target.startswith(os.path.join(folder, "")):
        raise DataError(f"{shown(path)} is not a path of a file in {root}, links followed")
    return Path(target)


def write_lines(path: FilePath, lines: Iterable[str]) -> int:
    """Write lines to a file and return their number; parent folders are created.

    The file appears under its name once it is complete; an older file is kept if writing fails.

    Raises:
        ArtifactError: The file cannot be written.
    """
    count = 0
    with (
        atomic_file(Path(path)) as partial,
        open(partial, "w", encoding="utf-8", newline="\n") as file,
    ):
        for line in lines:
            file.write(line + "\n")
            count += 1
    return count


class RowIndex(Generic[Record]):
    """Random access to the records of a file; only their offsets are kept in memory.

    Blank lines are not rows. Several threads can read rows at once; forked and unpickled copies
    read the file independently.
    """

    starts: Int[ndarray, "rows+1"]
    """Offset of each row in the file, in bytes; the last entry is the size of the file."""
    line_numbers: Int[ndarray, "rows"]

    def __init__(self, path: FilePath, parse: Callable[[bytes], Record]):
        """Find the rows in one pass over the file.

        Args:
            path: The file.
            parse: Returns the record of a line, such as `mbeir.parse_query`.

        Raises:
            DataError: The file does not exist or cannot be read.
        """
        self.path = Path(path)
        self.parse = parse
        starts, line_numbers = array("q"), array("q")
        for line in numbered_lines(path):
            if not line.content.isspace():
                starts.append(line.start)
                line_numbers.append(line.number)
        with reading(path):
            starts.append(self.path.stat().st_size)
        self.starts = np.array(starts, np.int64)
        self.line_numbers = np.array(line_numbers, np.int64)
        self._open()

    def __len__(self) -> int:
        return len(self.line_numbers)

    def __getitem__(self, row: SupportsIndex) -> Record:
        """Return the record of a row.

        Raises:
            DataError: The record is bad, or the file can no longer be read.
            IndexError: There is no such row.
        """
        row = range(len(self))[row]
        start, end = int(self.starts[row]), int(self.starts[row + 1])
        with reading(self.path):
            # pread uses no file position that a forked process or another thread could move.
            content = os.pread(self._descriptor, min(end - start, MAX_LINE_BYTES + 1), start)
        try:
            return self.parse(content)
        except DataError as error:
            raise located(error, self.path, int(self.line_numbers[row])) from None

    def _open(self) -> None:
        with reading(self.path):
            self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()


@contextmanager
def reading(path: FilePath) -> Iterator[None]:
    """Turn the operating system's errors while a path is read into one line.

    Raises:
        DataError: The path cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
