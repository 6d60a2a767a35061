"""Random access by row to built training data, from any process and any local or bucket path.

`puma_jax.data.builder` writes it:
```
build.json          settings, inputs and tokenizer of the build; digests of what it wrote
instructions.json   instruction keys, their prompts as tokens, names of the sets
table/              lengths and positives, see `LengthTable`
queries/            array_record shards in row order, readable by TFDS too
candidates/         the same for candidates
parts/              needed only to resume a build; copies may leave it out
```
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, SupportsIndex

from etils import epath
from PIL import Image

from puma_jax.data.examples import Record, from_example
from puma_jax.data.images import open_image
from puma_jax.data.lines import FilePath, resolve_inside
from puma_jax.data.mbeir.records import InstructionKey
from puma_jax.data.table import LengthTable
from puma_jax.errors import CheckpointError, ConfigError, DataError, ImageError
from puma_jax.files import Digest, as_json, parse_json, sha256_of
from puma_jax.schema import Count, CountOrZero, from_json

BUILD_VERSION = 2
"""Version of the format; builds of other versions are neither read nor resumed."""

BUILD_FILE = "build.json"
INSTRUCTIONS_FILE = "instructions.json"
TABLE_FOLDER = "table"
PARTS_FOLDER = "parts"

TableName = Literal["queries", "candidates"]


@dataclass(frozen=True)
class Prompt:
    """One wording of an instruction."""

    text: str
    """The text in the table of instructions."""
    tokens: tuple[CountOrZero, ...]
    """The result of `Processor.tokenize_instruction`; it comes before the tokens of a query."""


@dataclass(frozen=True)
class Instructions:
    """The values behind the indices in the columns `query_key` and `query_set`."""

    keys: tuple[InstructionKey, ...]
    prompts: tuple[tuple[Prompt, ...], ...]
    """The prompts of each key."""
    sets: tuple[str, ...]
    """Names of dataset and task, such as "nights_task4"."""

    def to_json(self) -> str:
        """Return the content of `instructions.json`."""
        rows = [
            {"key": key, "prompts": [vars(prompt) for prompt in prompts]}
            for key, prompts in zip(self.keys, self.prompts, strict=True)
        ]
        return as_json({"sets": self.sets, "instructions": rows})

    @classmethod
    def from_json(cls, value: Any) -> Instructions:
        """Return the instructions that `to_json` wrote.

        Raises:
            ConfigError: A field is not as `to_json` writes it.
        """
        file = from_json(_InstructionsFile, value)
        rows = file.instructions
        return cls(tuple(row.key for row in rows), tuple(row.prompts for row in rows), file.sets)


@dataclass(frozen=True)
class _InstructionRow:
    key: InstructionKey
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class _InstructionsFile:
    sets: tuple[str, ...]
    instructions: tuple[_InstructionRow, ...]


@dataclass(frozen=True)
class Finished:
    """Record of what a finished build has read and written."""

    inputs: dict[str, Digest]
    """The state of each file that was read, by its path below the root."""
    shards: dict[str, tuple[CountOrZero, ...]]
    """Number of records in each shard of each table."""
    files: dict[str, str]
    """SHA-256 of the instructions and of each column of the table, by path."""
    sha256: str
    """Digest of all other fields of build.json, so that no damage to it goes unseen."""


@dataclass(frozen=True)
class Build:
    """The content of build.json."""

    version: Literal[2]
    root: str
    """Folder of the benchmark that was built."""
    sets: tuple[str, ...]
    images: Literal["inline", "path"]
    shard_items: Count
    prompt: dict[str, Any]
    """Settings that decide the tokens of a text; see `prompts.prompt_fingerprint`."""
    finished: Finished | None = None
    """None until everything is written."""


def build_digest(job: Mapping[str, Any], finished: Mapping[str, Any]) -> str:
    """Return the digest of a build; both arguments are as build.json has them."""
    others = {name: value for name, value in finished.items() if name != "sha256"}
    return sha256_of([{**job, "finished": None}, others])


class Store:
    """Random access to built data.

    Files are opened on first use, and every process opens its own, so a store can be pickled,
    forked and shared by threads.
    """

    def __init__(self, path: str, root: str, prompt: dict[str, Any], finished: Finished):
        """Wrap a folder; use `Store.open` instead."""
        self.path = path
        self.root = root
        self._prompt = prompt
        self._finished = finished
        self._sources: dict[tuple[int, TableName], Any] = {}

    @classmethod
    def open(cls, path: FilePath, root: FilePath | None = None) -> Store:
        """Open what `python -m puma_jax.data.builder --out PATH` wrote.

        Args:
            path: A folder, or a bucket path such as "gs://bucket/folder".
            root: Folder or bucket path of the benchmark, with the images that are not stored
                inline; None takes the one that the data was built from.

        Raises:
            DataError: There is no finished build, or it is damaged or of another version.
        """
        build = _read_build(epath.Path(path) / BUILD_FILE)
        if build is None or build.finished is None:
            raise DataError(
                f"{path} holds no finished build: run python -m puma_jax.data.builder --out {path}"
            )
        folder = os.fspath(epath.Path(path))
        root = build.root if root is None else epath.Path(root)
        return cls(folder, os.fspath(root), build.prompt, build.finished)

    @cached_property
    def table(self) -> LengthTable:
        """The lengths and positives of every row.

        Raises:
            DataError: A column is missing or damaged.
        """
        folder = epath.Path(self.path) / TABLE_FOLDER
        digests = {
            name.removeprefix(f"{TABLE_FOLDER}/"): digest
            for name, digest in self._finished.files.items()
        }
        table = LengthTable.load(folder, digests)
        counts = {"queries": len(table.query_tokens), "candidates": len(table.candidate_tokens)}
        for name, rows in counts.items():
            if sum(self._finished.shards.get(name, ())) != rows:
                raise DataError(f"{folder} has {rows} {name}, its shards have not: build it again")
        limits = {
            "query_key": len(self.instructions.keys),
            "query_set": len(self.instructions.sets),
        }
        for name, limit in limits.items():
            if getattr(table, name).max(initial=-1) >= limit:
                raise DataError(f"{folder}: {name} is beyond {INSTRUCTIONS_FILE}: build it again")
        return table

    @cached_property
    def instructions(self) -> Instructions:
        """The instructions and the names of sets that the table refers to.

        Raises:
            DataError: Their file is missing or damaged.
        """
        path = epath.Path(self.path) / INSTRUCTIONS_FILE
        content = _read_file(path)
        if hashlib.sha256(content).hexdigest() != self._finished.files.get(INSTRUCTIONS_FILE):
            raise DataError(f"{path} is damaged, it is not what was built: build the data again")
        return Instructions.from_json(parse_json(content))

    def query(self, row: SupportsIndex) -> Record:
        """Return the query of a row.

        Raises:
            DataError: The row cannot be read.
            IndexError: There is no such row.
        """
        return self._record("queries", row)

    def candidate(self, row: SupportsIndex) -> Record:
        """Return the candidate of a row; it raises the errors of `query`."""
        return self._record("candidates", row)

    def image(self, record: Record) -> Image.Image:
        """Return the image of a record, see `open_image`.

        Raises:
            ImageError: The image cannot be read or decoded, or the record has none.
        """
        with self.image_source(record) as source:
            return open_image(source)

    @property
    def is_remote(self) -> bool:
        """Whether images are files of a bucket."""
        return "://" in self.root

    @contextmanager
    def image_source(self, record: Record) -> Iterator[str | os.PathLike[str] | bytes]:
        """Yield the path of the image of a record, or the bytes of its file.

        Raises:
            ImageError: The record has no image, or an error in the block, which then names it.
        """
        try:
            if isinstance(record.image, bytes):
                yield record.image
            elif record.image is None:
                raise ImageError("there is no image")
            elif self.is_remote:
                yield _bytes_of(epath.Path(self.root) / record.image)
            else:
                yield resolve_inside(self.root, record.image)
        except (DataError, ImageError) as error:
            name = f"{record.id} ({record.image})" if isinstance(record.image, str) else record.id
            raise ImageError(f"{name}: {error}") from error

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Check that the stored tokens are those a model makes of the same texts.

        Args:
            fingerprint: From `prompts.prompt_fingerprint`, for the processor of the model.

        Raises:
            CheckpointError: The tokenizer, the template or the truncation of texts differs.
        """
        for name, expected in fingerprint.items():
            found = self._prompt.get(name)
            if found != expected:
                raise CheckpointError(
                    f"{self.path} was built with {name} {found}, the model has {expected}: "
                    "build the data again with --model set to this model"
                )

    def _record(self, name: TableName, row: SupportsIndex) -> Record:
        source = self._source(name)
        row = range(len(source))[row]
        try:
            return from_example(source[row])
        except Exception as error:  # array_record and protobuf raise errors of their own
            raise DataError(f"{self.path}: row {row} of {name} cannot be read: {error}") from error

    def _source(self, name: TableName) -> Any:
        # A forked process must not share readers: they hold locks and threads of the parent.
        key = (os.getpid(), name)
        if key not in self._sources:
            folder = epath.Path(self.path) / name
            self._sources[key] = _open_shards(folder, self._finished.shards.get(name, ()))
        return self._sources[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path, self.root, self._prompt, self._finished)


def _open_shards(folder: epath.Path, lengths: tuple[int, ...]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    # With known lengths, a shard is opened when one of its rows is first read.
    return ArrayRecordDataSource(
        [
            f"{folder / shard_name(folder.name, number, len(lengths))}[0:{length}]"
            for number, length in enumerate(lengths)
        ]
    )


def shard_name(table: str, number: int, shards: int) -> str:
    """Return the TFDS file name of a shard."""
    return f"{table}-train.array_record-{number:05}-of-{shards:05}"


def _read_build(path: epath.Path) -> Build | None:
    """Return what a build.json holds, None if there is none."""
    if not path.exists():
        return None
    try:
        value = parse_json(_read_file(path))
        version = value.get("version") if isinstance(value, dict) else None
        if version != BUILD_VERSION:
            raise DataError(
                f"{path} is of version {version} of the format, expected {BUILD_VERSION}: "
                "build the data again, in another folder"
            )
        build = from_json(Build, value)
    except (ValueError, ConfigError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    finished = value.get("finished")
    if finished is not None and finished["sha256"] != build_digest(value, finished):
        raise DataError(f"{path} is damaged: build the data again")
    return build


def _read_file(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: build the data again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _bytes_of(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from error
