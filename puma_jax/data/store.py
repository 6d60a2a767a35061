"""Random access by row to built training data, from any process and any local or bucket path.

`puma_jax.data.builder` writes it:
```
build.json          settings, inputs and tokenizer of the build
instructions.json   instruction keys, their prompts as tokens, names of the sets
table/              lengths and positives, see `LengthTable`
queries/            array_record shards in row order, readable by TFDS too
candidates/         the same for candidates
parts/              needed only to resume a build; copies may leave it out
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, SupportsIndex

from etils import epath
from PIL import Image

from puma_jax.data.examples import Record, from_example
from puma_jax.data.images import open_image
from puma_jax.data.lines import FilePath
from puma_jax.data.mbeir.records import InstructionKey
from puma_jax.data.table import LengthTable
from puma_jax.errors import CheckpointError, DataError, ImageError

BUILD_FILE = "build.json"
INSTRUCTIONS_FILE = "instructions.json"
TABLE_FOLDER = "table"
PARTS_FOLDER = "parts"

TableName = Literal["queries", "candidates"]


class Prompt(NamedTuple):
    """One wording of an instruction."""

    text: str
    """The text in the table of instructions."""
    tokens: tuple[int, ...]
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
            {"key": key, "prompts": [prompt._asdict() for prompt in prompts]}
            for key, prompts in zip(self.keys, self.prompts, strict=True)
        ]
        return as_json({"sets": self.sets, "instructions": rows})

    @classmethod
    def from_json(cls, content: str) -> Instructions:
        """Return the instructions that `to_json` wrote."""
        fields = json.loads(content)
        rows = fields["instructions"]
        return cls(
            keys=tuple(tuple(row["key"]) for row in rows),
            prompts=tuple(
                tuple(Prompt(prompt["text"], tuple(prompt["tokens"])) for prompt in row["prompts"])
                for row in rows
            ),
            sets=tuple(fields["sets"]),
        )


class Store:
    """Random access to built data.

    Files are opened on first use, and every process opens its own, so a store can be pickled,
    forked and shared by threads.
    """

    def __init__(self, path: str, root: str, build: dict[str, Any]):
        """Wrap a folder; use `Store.open` instead."""
        self.path = path
        self.root = root
        self._build = build
        self._sources: dict[tuple[int, TableName], Any] = {}

    @classmethod
    def open(cls, path: FilePath, root: FilePath | None = None) -> Store:
        """Open what `python -m puma_jax.data.builder --out PATH` wrote.

        Args:
            path: A folder, or a bucket path such as "gs://bucket/folder".
            root: Folder or bucket path of the benchmark, with the images that are not stored
                inline; None takes the one that the data was built from.

        Raises:
            DataError: There is no finished build.
        """
        folder = epath.Path(path)
        if not (folder / INSTRUCTIONS_FILE).exists():
            raise DataError(
                f"{path} holds no finished build: run python -m puma_jax.data.builder --out {path}"
            )
        # Builds without a template name were made when "chat" was the only one.
        build = {"template": "chat"} | _read(folder / BUILD_FILE, json.loads)
        root = build["root"] if root is None else epath.Path(root)
        return cls(os.fspath(folder), os.fspath(root), build)

    @cached_property
    def table(self) -> LengthTable:
        """The lengths and positives of every row."""
        return LengthTable.load(epath.Path(self.path) / TABLE_FOLDER)

    @cached_property
    def instructions(self) -> Instructions:
        """The instructions and the names of sets that the table refers to."""
        return _read(epath.Path(self.path) / INSTRUCTIONS_FILE, Instructions.from_json)

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
        """Return the decoded image of a record that has one.

        Raises:
            ImageError: The image cannot be read or decoded, or the record has none.
        """
        try:
            if isinstance(record.image, bytes):
                return open_image(record.image)
            if record.image is None:
                raise ImageError("there is no image")
            path = epath.Path(self.root) / record.image
            in_bucket = "://" in self.root
            return open_image(_bytes_of(path) if in_bucket else path)
        except ImageError as error:
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
            found = self._build.get(name)
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
            self._sources[key] = _open_shards(epath.Path(self.path) / name)
        return self._sources[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path, self.root, self._build)


def as_json(value: object) -> str:
    """Return indented JSON that ends with a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _open_shards(folder: epath.Path) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    info = _read(folder / "dataset_info.json", json.loads)
    lengths = [int(length) for length in info["splits"][0]["shardLengths"]]
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


def _read(path: epath.Path, parse: Callable[[str], Any]) -> Any:
    """Return the parsed content of a JSON file."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _bytes_of(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from error
