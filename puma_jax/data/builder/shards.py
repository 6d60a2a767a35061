"""Lines of a benchmark into shards of records, by as many processes as there are.

A shard is a function of its lines alone: it does not matter who builds it, when, or which others
there are. It appears under its name once it is complete, together with a part: its columns for the
table of lengths. So a build that is stopped goes on with the first shard that is missing.
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
from puma_jax.data.mbeir import parse_candidate, parse_query
from puma_jax.data.mbeir.lines import BadRecords, OnBadRecord, located, reject, shown
from puma_jax.data.mbeir.records import modality_code
from puma_jax.data.prompts import Prompter, TextCutWarning, normalise, query_text
from puma_jax.data.store import TableName
from puma_jax.errors import DataError, ImageError, ItemError
from puma_jax.typing import Bool, Int, ndarray

COLUMNS = ("tokens", "plain_tokens", "text_length", "height", "width", "modality")


@dataclass(frozen=True)
class Shard:
    """Where a shard goes, and what it is made of."""

    table: TableName
    path: Path
    part: Path
    lines: Lines


@dataclass(frozen=True)
class Part:
    """What is known of the lines of a shard, or of a whole table, once they have been read."""

    kept: Bool[ndarray, "lines"]
    """Which of them are records; the others are bad."""
    columns: Int[ndarray, "records columns"]
    """`COLUMNS` of each record; lengths for tokens."""
    bad: tuple[str, ...]
    """What is wrong with each bad record."""

    def column(self, name: str) -> Int[ndarray, "records"]:
        """Return one of `COLUMNS`."""
        return np.ascontiguousarray(self.columns[:, COLUMNS.index(name)])

    def save(self, path: Path) -> None:
        """Write the part to a file, which appears whole."""
        partial = partial_path(path)
        with open(partial, "wb") as file:
            np.savez(file, kept=self.kept, columns=self.columns, bad=np.array(self.bad, str))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Part:
        """Return what `save` wrote.

        Raises:
            DataError: The file is damaged.
        """
        try:
            with np.load(path) as part:
                return cls(part["kept"], part["columns"], tuple(part["bad"].tolist()))
        except Exception as error:  # whatever zipfile and NumPy trip over
            raise DataError(f"{path} cannot be read, delete it: {error}") from error

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """Return the part of all lines of some parts, in their order."""
        return cls(
            np.concatenate([part.kept for part in parts]),
            np.concatenate([part.columns for part in parts]),
            tuple(message for part in parts for message in part.bad),
        )


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards, one after the other."""

    prompter: Prompter
    root: Path
    """Of the benchmark: image paths are relative to it."""
    inline: bool
    """Whether to store the bytes of images, rather than their paths."""
    on_bad_record: OnBadRecord

    def write(self, shard: Shard) -> int:
        """Write a shard and its part; return how many lines have been read for it.

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
            Part(kept, table, tuple(bad.messages)).save(shard.part)
        return lines

    def _candidate(self, line: bytes) -> Record:
        candidate = parse_candidate(line)
        text = normalise(candidate.text)
        _check_text("txt", candidate.text, text, candidate.image)
        body = self.prompter.body(text, image=candidate.image is not None)
        image, height, width = self._image("img_path", candidate.image)
        return Record(
            id=candidate.did,
            modality=modality_code(candidate.modality),
            image=image,
            height=height,
            width=width,
            tokens=np.array(body.tokens, np.int32),
            text_length=body.text,
            plain_tokens=np.zeros(0, np.int32),
        )

    def _query(self, line: bytes) -> Record:
        query = parse_query(line)
        plain = query_text(None, query.text)
        _check_text("query_txt", query.text, plain, query.image)
        with_image = query.image is not None
        body = self.prompter.body(instructed_text(query.text), image=with_image, instructed=True)
        image, height, width = self._image("query_img_path", query.image)
        return Record(
            id=query.qid,
            modality=modality_code(query.modality),
            image=image,
            height=height,
            width=width,
            tokens=np.array(body.tokens, np.int32),
            text_length=body.text,
            plain_tokens=np.array(self.prompter.body(plain, image=with_image).tokens, np.int32),
        )

    def _image(self, name: str, path: str | None) -> tuple[bytes | str | None, int, int]:
        """Return what is stored of an image, its height and its width."""
        if path is None:
            return None, 0, 0
        config = self.prompter.config
        try:
            height, width = image_size(self.root / path)
            # Refuses what is too elongated for the model, before a plan counts on it.
            resized_sizes(np.array([height]), np.array([width]), config.vision, config.images)
            return (self.root / path).read_bytes() if self.inline else path, height, width
        except (ImageError, OSError) as error:
            # Paths as the record has them: where the benchmark lies is nothing to store.
            raise ImageError(f"{name} {str(error).replace(f'{self.root}/', '')}") from error


@contextmanager
def shard_writing(
    writer: ShardWriter, workers: int
) -> Iterator[Callable[[Sequence[Shard]], Iterator[int]]]:
    """Yield a function that writes shards and yields, of each in turn, how many lines it had.

    Several shards are written by up to `workers` processes, which start when they are needed.

    Raises:
        DataError: As `ShardWriter.write`; or a process was killed.
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
                "a process that built a shard was killed; if memory ran out, take fewer --workers"
            ) from error


def instructed_text(text: str | None) -> str:
    r"""Return what `query_text` makes of a query's own text behind an instruction.

    >>> instructed_text("a red bicycle")
    'a red bicycle.'
    """
    return query_text("X.", text).removeprefix("X.").removeprefix("\n")


def partial_path(path: Path) -> Path:
    """Return where this process writes what is to become a file."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _check_text(name: str, given: str | None, text: str, image: str | None) -> None:
    """Refuse an item of text that is none once quotes and white space are gone."""
    if not text and image is None:
        raise DataError(f"{name} is {shown(given)}, which leaves no text")


def _length(value: int | ndarray) -> int:
    return value if isinstance(value, int) else len(value)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write; it gets its name if all goes well, and goes away otherwise."""
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

    # One record in a group, or reading a record would mean reading its neighbours.
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    try:
        # Builds say in numbers, once they are done, how many texts have been cut.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TextCutWarning)
            yield writer.write
        writer.close()
    except RuntimeError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


_writer: ShardWriter
"""Of a worker process: it comes once, not with every shard."""


def _start_worker(writer: ShardWriter) -> None:
    global _writer
    _writer = writer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(shard: Shard) -> int:
    return _writer.write(shard)
