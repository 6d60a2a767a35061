"""Writes lines of a benchmark to shards of records, in several processes.

A shard is a function of its lines alone, whichever process builds it and whatever other shards
there are. It appears under its name once it is complete, together with a part: the columns of its
records for the length table. A build that was stopped resumes with the first missing shard.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puma_jax.data.builder.sources import Lines
from puma_jax.data.examples import Record, to_example
from puma_jax.data.images import image_size, resized_sizes
from puma_jax.data.lines import BadRecords, OnBadRecord, located, reject, shown
from puma_jax.data.mbeir import parse_candidate, parse_query
from puma_jax.data.mbeir.records import modality_code
from puma_jax.data.prompts import Processor, TextTruncationWarning, normalize_text, query_text
from puma_jax.data.store import TableName
from puma_jax.errors import DataError, ImageError, ItemError
from puma_jax.typing import Bool, Int, ndarray

COLUMNS = ("tokens", "plain_tokens", "text_length", "height", "width", "modality")


@dataclass(frozen=True)
class Shard:
    """The output files and the input lines of a shard."""

    table: TableName
    path: Path
    part: Path
    lines: Lines


@dataclass(frozen=True)
class ShardColumns:
    """The columns and bad records of the lines of a shard or of a whole table."""

    kept: Bool[ndarray, "lines"]
    """Which lines are good records."""
    columns: Int[ndarray, "records columns"]
    """`COLUMNS` of each record; token columns hold lengths."""
    bad: tuple[str, ...]
    """The error message of each bad record."""

    def column(self, name: str) -> Int[ndarray, "records"]:
        """Return one of `COLUMNS`."""
        return np.ascontiguousarray(self.columns[:, COLUMNS.index(name)])

    def save(self, path: Path) -> None:
        """Write the columns to a file, which appears complete."""
        partial = partial_path(path)
        with open(partial, "wb") as file:
            np.savez(file, kept=self.kept, columns=self.columns, bad=np.array(self.bad, str))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> ShardColumns:
        """Return the columns that `save` wrote.

        Raises:
            DataError: The file is damaged.
        """
        try:
            with np.load(path) as part:
                return cls(part["kept"], part["columns"], tuple(part["bad"].tolist()))
        except Exception as error:  # zipfile and NumPy raise many kinds of errors
            raise DataError(f"{path} cannot be read, delete it: {error}") from error

    @classmethod
    def joined(cls, parts: Sequence[ShardColumns]) -> ShardColumns:
        """Return the columns of several shards, concatenated in order."""
        return cls(
            np.concatenate([part.kept for part in parts]),
            np.concatenate([part.columns for part in parts]),
            tuple(message for part in parts for message in part.bad),
        )


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards, one at a time."""

    processor: Processor
    root: Path
    """Root of the benchmark; image paths are relative to it."""
    inline: bool
    """Whether to store the bytes of image files instead of their paths."""
    on_bad_record: OnBadRecord

    def write(self, shard: Shard) -> int:
        """Write a shard and its part; return the number of lines read.

        Raises:
            DataError: A file cannot be read or written, or a record is bad and `on_bad_record`
                is "error".
        """
        make = self._query if shard.table == "queries" else self._candidate
        lines = len(shard.lines)
        kept = np.zeros(lines, bool)
        columns = []
        bad = BadRecords(keep=lines)
        with _replacing(shard.path) as partial, _array_record(partial) as write:
            for at, (path, line) in enumerate(shard.lines.read()):
                try:
                    record = make(line.content)
                except (DataError, ItemError) as error:
                    reject(located(error, path, line.number), self.on_bad_record, bad)
                    continue
                write(to_example(record))
                kept[at] = True
                columns.append([_length(getattr(record, name)) for name in COLUMNS])
            table = np.array(columns, np.int32).reshape(-1, len(COLUMNS))
            ShardColumns(kept, table, tuple(bad.messages)).save(shard.part)
        return lines

    def _candidate(self, line: bytes) -> Record:
        candidate = parse_candidate(line)
        text = normalize_text(candidate.text)
        _check_text("txt", candidate.text, text, candidate.image)
        tokenized = self.processor.tokenize_text(text, image=candidate.image is not None)
        image, height, width = self._image("img_path", candidate.image)
        return Record(
            id=candidate.did,
            modality=modality_code(candidate.modality),
            image=image,
            height=height,
            width=width,
            tokens=np.array(tokenized.tokens, np.int32),
            text_length=tokenized.text_length,
            plain_tokens=np.zeros(0, np.int32),
        )

    def _query(self, line: bytes) -> Record:
        query = parse_query(line)
        plain = query_text(None, query.text)
        _check_text("query_txt", query.text, plain, query.image)
        with_image = query.image is not None
        tokenized = self.processor.tokenize_text(
            instructed_text(query.text), image=with_image, instructed=True
        )
        image, height, width = self._image("query_img_path", query.image)
        return Record(
            id=query.qid,
            modality=modality_code(query.modality),
            image=image,
            height=height,
            width=width,
            tokens=np.array(tokenized.tokens, np.int32),
            text_length=tokenized.text_length,
            plain_tokens=np.array(
                self.processor.tokenize_text(plain, image=with_image).tokens, np.int32
            ),
        )

    def _image(self, name: str, path: str | None) -> tuple[bytes | str | None, int, int]:
        """Return the bytes or path of an image, its height and its width in pixels."""
        if path is None:
            return None, 0, 0
        config = self.processor.config
        try:
            height, width = image_size(self.root / path)
            # Raises for images that are too elongated for the model, before they are planned with.
            resized_sizes(np.array([height]), np.array([width]), config.vision, config.images)
            return (self.root / path).read_bytes() if self.inline else path, height, width
        except (ImageError, OSError) as error:
            # Messages are stored: they name the path in the record, not the root of the benchmark.
            raise ImageError(f"{name} {str(error).replace(f'{self.root}/', '')}") from error


@contextmanager
def shard_writing(
    writer: ShardWriter, workers: int
) -> Iterator[Callable[[Sequence[Shard]], Iterator[int]]]:
    """Yield a function that writes shards and yields the number of lines of each, in order.

    Several shards are written by up to `workers` processes, which start on first use.

    Raises:
        DataError: `ShardWriter.write` raised it, or a process was killed.
    """
    # Not forked: this process may have threads, of JAX or of the tokenizer, that a fork breaks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (writer,)) as pool:

        def write(shards: Sequence[Shard]) -> Iterator[int]:
            alone = workers == 1 or len(shards) == 1
            return map(writer.write, shards) if alone else pool.map(_write, shards)

        try:
            yield write
        except BrokenProcessPool as error:
            raise DataError(
                "a process that built a shard was killed; if memory ran out, use fewer --workers"
            ) from error


def instructed_text(text: str | None) -> str:
    r"""Return the text of a query as `query_text` writes it after an instruction.

    >>> instructed_text("a red bicycle")
    'a red bicycle.'
    """
    return query_text("X.", text).removeprefix("X.").removeprefix("\n")


def partial_path(path: Path) -> Path:
    """Return the path at which this process writes a file before renaming it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _check_text(name: str, given: str | None, text: str, image: str | None) -> None:
    """Refuse an item without image whose text has only quotes and white space."""
    if not text and image is None:
        raise DataError(f"{name} is {shown(given)}, which leaves no text")


def _length(value: int | ndarray) -> int:
    return value if isinstance(value, int) else len(value)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write; it is renamed on success and removed otherwise."""
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _array_record(path: Path) -> Iterator[Callable[[bytes], Any]]:
    """Yield a function that appends a record to a file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record in a group, because reading a record reads its whole group.
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    try:
        # The summary of a build has the number of truncated texts.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TextTruncationWarning)
            yield writer.write
        writer.close()
    except RuntimeError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


_writer: ShardWriter
"""The writer of this worker process, sent once and not with every shard."""


def _start_worker(writer: ShardWriter) -> None:
    global _writer
    _writer = writer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(shard: Shard) -> int:
    return _writer.write(shard)
