"""Writes lines of a benchmark to shards of records, in several processes.

A shard is a function of its lines and their images alone, whichever process builds it and whatever
other shards there are. It appears under its name once it is complete, followed by a part: the
columns of its records for the length table, and what the shard was made of. A build that was
stopped, or whose files were edited since, writes the shards that are missing or of other lines.
"""

from __future__ import annotations

import hashlib
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
from typing import Any, NamedTuple

import numpy as np

from puma_jax.artifacts import atomic_file
from puma_jax.data.builder.sources import Lines, stamp_of
from puma_jax.data.examples import Record, to_example
from puma_jax.data.images import resized_sizes
from puma_jax.data.lines import BadRecords, OnBadRecord, located, reject
from puma_jax.data.mbeir import parse_candidate, parse_query, read_image
from puma_jax.data.mbeir.records import content_key, modality_code
from puma_jax.data.prompts import Processor, TextTruncationWarning
from puma_jax.data.store import TableName
from puma_jax.errors import ArtifactError, DataError, ImageError, ItemError
from puma_jax.typing import Bool, Int, UInt64, ndarray

COLUMNS = ("tokens", "plain_tokens", "text_length", "height", "width", "modality")


@dataclass(frozen=True)
class Shard:
    """The output files and the input lines of a shard."""

    table: TableName
    path: Path
    part: Path
    lines: Lines

    def is_written(self) -> bool:
        """Return whether the shard is there, whole, and of these lines as they are now."""
        if not (self.path.exists() and self.part.exists()):
            return False
        try:
            part = ShardColumns.load(self.part)
        except DataError:
            return False
        return part.made_of == (self.lines.fingerprint, self.path.stat().st_size)


@dataclass(frozen=True)
class ShardColumns:
    """The columns and bad records of the lines of a shard or of a whole table."""

    kept: Bool[ndarray, "lines"]
    """Which lines are good records."""
    columns: Int[ndarray, "records columns"]
    """`COLUMNS` of each record; token columns hold lengths."""
    content: UInt64[ndarray, "records"]
    """The `content_key` of each record, its image told by a digest."""
    bad: tuple[str, ...]
    """The error message of each bad record."""
    made_of: tuple[str, int] = ("", 0)
    """Fingerprint of the lines of a shard, and the size of its file in bytes."""

    def column(self, name: str) -> Int[ndarray, "records"]:
        """Return one of `COLUMNS`."""
        return np.ascontiguousarray(self.columns[:, COLUMNS.index(name)])

    def save(self, path: Path) -> None:
        """Write the columns to a file, which appears complete."""
        fingerprint, size = self.made_of
        with atomic_file(path) as partial, open(partial, "wb") as file:
            np.savez(
                file,
                kept=self.kept,
                columns=self.columns,
                content=self.content,
                bad=np.array(self.bad, str),
                fingerprint=np.array(fingerprint),
                size=np.array(size, np.int64),
            )

    @classmethod
    def load(cls, path: Path) -> ShardColumns:
        """Return the columns that `save` wrote.

        Raises:
            DataError: The file is damaged.
        """
        try:
            with np.load(path) as part:
                return cls(
                    part["kept"],
                    part["columns"],
                    part["content"],
                    tuple(part["bad"].tolist()),
                    (str(part["fingerprint"]), int(part["size"])),
                )
        except Exception as error:  # zipfile, NumPy and zlib raise many kinds of errors
            raise DataError(f"{path} cannot be read, delete it: {error}") from error

    @classmethod
    def joined(cls, parts: Sequence[ShardColumns]) -> ShardColumns:
        """Return the columns of several shards, concatenated in order."""
        return cls(
            np.concatenate([part.kept for part in parts]),
            np.concatenate([part.columns for part in parts]),
            np.concatenate([part.content for part in parts]),
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
            DataError: A file cannot be read, or has changed since its lines were found, or a
                record is bad and `on_bad_record` is "error".
            ArtifactError: A file cannot be written.
        """
        make = self._query if shard.table == "queries" else self._candidate
        lines = len(shard.lines)
        kept = np.zeros(lines, bool)
        columns, content = [], []
        bad = BadRecords(keep=lines)
        with atomic_file(shard.path) as partial, _array_record(partial) as write:
            for at, (path, line) in enumerate(shard.lines.read()):
                try:
                    record, key = make(line.content, int(shard.lines.stamp[at]))
                except _ChangedError as error:
                    raise located(error, path, line.number) from None
                except (DataError, ItemError) as error:
                    reject(located(error, path, line.number), self.on_bad_record, bad)
                    continue
                write(to_example(record))
                kept[at] = True
                columns.append([_length(getattr(record, name)) for name in COLUMNS])
                content.append(key)
        # Last: a part says that its shard is finished.
        ShardColumns(
            kept,
            np.array(columns, np.int32).reshape(-1, len(COLUMNS)),
            np.array(content, np.uint64),
            tuple(bad.messages),
            (shard.lines.fingerprint, shard.path.stat().st_size),
        ).save(shard.part)
        return lines

    def _candidate(self, line: bytes, stamp: int) -> tuple[Record, int]:
        """Return the record of a candidate, and the key of its content."""
        candidate = parse_candidate(line)
        self._check_unchanged(line, candidate.image, stamp)
        tokenized = self.processor.tokenize_text(
            self.processor.read(candidate.text), image=candidate.image is not None
        )
        image = self._image("img_path", candidate.image)
        record = Record(
            id=candidate.did,
            modality=modality_code(candidate.modality),
            image=image.stored,
            height=image.height,
            width=image.width,
            tokens=np.array(tokenized.tokens, np.int32),
            text_length=tokenized.text_length,
            plain_tokens=np.zeros(0, np.int32),
        )
        return record, content_key(candidate.text, image.digest)

    def _query(self, line: bytes, stamp: int) -> tuple[Record, int]:
        """Return the record of a query, and the key of its content."""
        query = parse_query(line)
        self._check_unchanged(line, query.image, stamp)
        with_image = query.image is not None
        tokenized = self.processor.tokenize_text(
            self.processor.read_after_instruction(query.text), image=with_image, instructed=True
        )
        image = self._image("query_img_path", query.image)
        plain = self.processor.tokenize_text(self.processor.read(query.text), image=with_image)
        record = Record(
            id=query.qid,
            modality=modality_code(query.modality),
            image=image.stored,
            height=image.height,
            width=image.width,
            tokens=np.array(tokenized.tokens, np.int32),
            text_length=tokenized.text_length,
            plain_tokens=np.array(plain.tokens, np.int32),
        )
        return record, content_key(query.text, image.digest)

    def _check_unchanged(self, line: bytes, image: str | None, stamp: int) -> None:
        if stamp_of(line, self.root, image) != stamp:
            raise _ChangedError("changed while the data were built: run the same command again")

    def _image(self, name: str, path: str | None) -> _StoredImage:
        """Return what is stored of an image."""
        if path is None:
            return _StoredImage(None, 0, 0, None)
        config = self.processor.config
        content, image = read_image(self.root, name, path)
        try:
            # Raises for images that are too elongated for the model, before they are planned with.
            resized_sizes(
                np.array([image.height]), np.array([image.width]), config.vision, config.images
            )
        except ImageError as error:
            raise ImageError(f"{name} {path}: {error}") from error
        stored = content if self.inline else path
        digest = hashlib.sha256(content).hexdigest()
        return _StoredImage(stored, image.height, image.width, digest)


class _ChangedError(DataError):
    """A line or an image is not what it was when the lines were found."""


class _StoredImage(NamedTuple):
    stored: bytes | str | None
    height: int
    width: int
    digest: str | None


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


def _length(value: int | ndarray) -> int:
    return value if isinstance(value, int) else len(value)


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
        raise ArtifactError(f"{path.parent} cannot be written: {error}") from error


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
