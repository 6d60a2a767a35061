"""Built training data, read by row: any query, any candidate, in any process, from any path.

`puma_jax.data.builder` writes it:
```
build.json          what was built, from what, for which tokenizer
instructions.json   keys, their prompts as tokens, names of the sets
table/              lengths and positives, see `LengthTable`
queries/            array_record shards in row order, which TFDS reads too
candidates/         likewise
parts/              what resuming needs; may be left behind when the rest is copied
```
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, SupportsIndex

from etils import epath
from PIL import Image

from puma_jax.data.examples import Record, from_example
from puma_jax.data.images import open_image
from puma_jax.data.mbeir.lines import FilePath
from puma_jax.data.mbeir.records import InstructionKey
from puma_jax.data.prompts import Prompter
from puma_jax.data.table import LengthTable
from puma_jax.errors import CheckpointError, DataError, ImageError

BUILD_FILE = "build.json"
INSTRUCTIONS_FILE = "instructions.json"
TABLE_FOLDER = "table"
PARTS_FOLDER = "parts"

TableName = Literal["queries", "candidates"]


class Prompt(NamedTuple):
    """One way to say what is looked for."""

    text: str
    """As the table of instructions has it."""
    tokens: tuple[int, ...]
    """Of `Prompter.instruction`: what stands before the tokens of a query."""


@dataclass(frozen=True)
class Instructions:
    """What the numbers in the columns `query_key` and `query_set` mean."""

    keys: tuple[InstructionKey, ...]
    prompts: tuple[tuple[Prompt, ...], ...]
    """Of each key."""
    sets: tuple[str, ...]
    """Names of dataset and task, such as "nights_task4"."""

    def to_json(self) -> str:
        """Return the content of the file."""
        rows = [
            {"key": key, "prompts": [prompt._asdict() for prompt in prompts]}
            for key, prompts in zip(self.keys, self.prompts, strict=True)
        ]
        return as_json({"sets": self.sets, "instructions": rows})

    @classmethod
    def from_json(cls, content: str) -> Instructions:
        """Return what `to_json` wrote."""
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

    Nothing is opened before it is asked for, and every process opens files of its own, so a store
    may be pickled, forked and shared by threads.
    """

    def __init__(self, path: str, root: str, build: dict[str, Any]):
        """Wrap a folder; callers want `Store.open`."""
        self.path = path
        self.root = root
        self._build = build
        self._sources: dict[tuple[int, TableName], Any] = {}

    @classmethod
    def open(cls, path: FilePath, root: FilePath | None = None) -> Store:
        """Open what `python -m puma_jax.data.builder --out PATH` wrote.

        Args:
            path: A folder, or a bucket's path such as "gs://bucket/folder".
            root: Folder or bucket's path of the benchmark, where images lie that are not stored
                inline; None takes the one the data was built from.

        Raises:
            DataError: There is no finished build.
        """
        folder = epath.Path(path)
        if not (folder / INSTRUCTIONS_FILE).exists():
            raise DataError(
                f"{path} holds no finished build: run python -m puma_jax.data.builder --out {path}"
            )
        # Builds that do not name their template were made when there was only one.
        build = {"template": "chat"} | _read(folder / BUILD_FILE, json.loads)
        root = build["root"] if root is None else epath.Path(root)
        return cls(os.fspath(folder), os.fspath(root), build)

    @cached_property
    def table(self) -> LengthTable:
        """Lengths and positives of every row."""
        return LengthTable.load(epath.Path(self.path) / TABLE_FOLDER)

    @cached_property
    def instructions(self) -> Instructions:
        """Instructions and names of sets, by the numbers in the table."""
        return _read(epath.Path(self.path) / INSTRUCTIONS_FILE, Instructions.from_json)

    def query(self, row: SupportsIndex) -> Record:
        """Return the query of a row.

        Raises:
            DataError: The row cannot be read.
            IndexError: There is no such row.
        """
        return self._record("queries", row)

    def candidate(self, row: SupportsIndex) -> Record:
        """Return the candidate of a row; errors as of `query`."""
        return self._record("candidates", row)

    def image(self, record: Record) -> Image.Image:
        """Return the decoded image of a record that has one.

        Raises:
            ImageError: It cannot be read or decoded; or the record has none.
        """
        try:
            if isinstance(record.image, bytes):
                return open_image(record.image)
            if record.image is None:
                raise ImageError("there is no image")
            return open_image(_bytes_of(epath.Path(self.root) / record.image))
        except ImageError as error:
            name = f"{record.id} ({record.image})" if isinstance(record.image, str) else record.id
            raise ImageError(f"{name}: {error}") from error

    def check(self, prompter: Prompter) -> None:
        """Check that the stored tokens are those a model would make.

        Raises:
            CheckpointError: Its tokenizer or its template is another, or it cuts texts elsewhere.
        """
        for name, expected in wording(prompter).items():
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
        # A forked process must not share readers: they hold locks and threads of their parent.
        key = (os.getpid(), name)
        if key not in self._sources:
            self._sources[key] = _open_shards(epath.Path(self.path) / name)
        return self._sources[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path, self.root, self._build)


def wording(prompter: Prompter) -> dict[str, Any]:
    """Return what decides the tokens of a text.

    The tokenizer is known by the SHA-256 of its JSON, with [RET] in it, so that a base model and
    one that was trained from it are the same.
    """
    backend = prompter.tokenizer.backend_tokenizer.to_str()
    return {
        "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
        "max_text_tokens": prompter.config.prompt.max_text_tokens,
        "template": prompter.config.prompt.template,
    }


def as_json(value: object) -> str:
    """Return indented JSON that ends with a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _open_shards(folder: epath.Path) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    info = _read(folder / "dataset_info.json", json.loads)
    lengths = [int(length) for length in info["splits"][0]["shardLengths"]]
    # With their lengths given, shards are opened when a row of theirs is first read.
    return ArrayRecordDataSource(
        [
            f"{folder / shard_name(folder.name, number, len(lengths))}[0:{length}]"
            for number, length in enumerate(lengths)
        ]
    )


def shard_name(table: str, number: int, shards: int) -> str:
    """Return the name of a shard as TFDS spells it."""
    return f"{table}-train.array_record-{number:05}-of-{shards:05}"


def _read(path: epath.Path, parse: Callable[[str], Any]) -> Any:
    """Return what a JSON file holds."""
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
