"""Build training data: a folder in M-BEIR layout becomes tables of tokens and images, read by row.

`python -m puma_jax.data.builder --data.root M-BEIR --model Qwen2-VL-2B-Instruct --out data`

TFDS reads the tables too, `tfds.builder_from_directory("data/queries").as_data_source("train")`,
without TensorFlow. Rerun the same command to resume a build that was stopped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from puma_jax.data.builder.shards import (
    Shard,
    ShardColumns,
    ShardWriter,
    partial_path,
    shard_writing,
)
from puma_jax.data.builder.sources import (
    Ids,
    Lines,
    Queries,
    Reading,
    drop_unanswerable,
    find_candidates,
    find_queries,
    pool_files,
    query_files,
)
from puma_jax.data.examples import write_tfds_metadata
from puma_jax.data.lines import BadRecords, OnBadRecord, reject
from puma_jax.data.mbeir import read_instructions
from puma_jax.data.mbeir.layout import discover
from puma_jax.data.mbeir.records import Instruction, InstructionKey
from puma_jax.data.prompts import Processor, prompt_fingerprint
from puma_jax.data.store import (
    BUILD_FILE,
    INSTRUCTIONS_FILE,
    PARTS_FOLDER,
    TABLE_FOLDER,
    Instructions,
    Prompt,
    TableName,
    as_json,
    shard_name,
)
from puma_jax.data.table import LengthTable
from puma_jax.errors import ConfigError, DataError
from puma_jax.progress import Progress

_VERSION = 1
"""Version of the build format; builds of other versions are not resumed."""


@dataclass(frozen=True)
class Settings:
    """The data to build. The same settings give the same bytes with any number of workers."""

    root: Annotated[Path, tyro.conf.arg(name="data.root")]
    """Folder in M-BEIR layout. The union of its training sets is built, or all sets without one."""
    out: Path
    """Folder to write. It must be empty, missing, or hold a build with the same settings."""
    sets: tuple[str, ...] = ()
    """Datasets ("nights") or sets ("nights_task4") to build, with the documents that their queries
    refer to. Empty, the default, builds all sets and the whole pool."""
    images: Literal["inline", "path"] = "inline"
    """Store the bytes of image files ("inline"), or only their paths below the root ("path")."""
    shard_items: int = 8192
    """Lines in a shard."""
    on_bad_record: OnBadRecord = "error"
    """Stop at a bad record ("error"), or skip bad records and print their number ("skip")."""
    workers: int = os.cpu_count() or 1
    """Processes that build shards; their number changes only the time."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: A number is below 1, or a path is a bucket's.
        """
        for name in ("shard_items", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        for name, folder in (("data.root", self.root), ("out", self.out)):
            path = folder.as_posix()
            if re.match(r"\w{2,}:/", path):
                raise ConfigError(
                    f"{name} {path} is not a local folder: build in one, then copy it to the bucket"
                )


@dataclass(frozen=True)
class Summary:
    """The result of a build."""

    queries: int
    candidates: int
    sets: tuple[str, ...]
    skipped: BadRecords
    """The bad records that were skipped."""
    longest: int
    """Texts with `max_text_tokens` tokens; most of them were longer and are truncated."""


def build(settings: Settings, processor: Processor) -> Summary:
    """Build the tables of queries and candidates, or their missing parts, and return a summary.

    Args:
        settings: The data to build, and the folder to write.
        processor: The processor of the model to train.

    Raises:
        ConfigError: The folder to write holds something else.
        DataError: The benchmark has no training data, a file cannot be read or
            written, or a record is bad and `on_bad_record` is "error".
    """
    benchmark = discover(settings.root)
    files, pools = query_files(benchmark), pool_files(benchmark)
    rows = read_instructions(benchmark.instructions) if benchmark.instructions else {}
    inputs = [*files, *pools, *filter(None, [benchmark.instructions])]
    _claim(settings.out, _description(settings, processor, inputs))

    reading = Reading(settings.on_bad_record, BadRecords())
    ids: Ids = {}
    queries = find_queries(files, rows, settings.sets, ids, reading)
    documents, document_of_id = find_candidates(pools, ids, reading, only_named=bool(settings.sets))
    writer = ShardWriter(
        processor, settings.root, settings.images == "inline", settings.on_bad_record
    )
    with shard_writing(writer, settings.workers) as write:
        candidates = _write_table("candidates", documents, settings, write, reading)
        row_of_document = np.where(candidates.kept, np.cumsum(candidates.kept) - 1, -1)
        # Documents in no pool have index -1, which selects the -1 appended here.
        row_of_id = np.append(row_of_document, -1)[document_of_id]
        queries = drop_unanswerable(queries.renumbered(row_of_id), reading)
        records = _write_table("queries", queries.lines, settings, write, reading)
    queries = queries.take(np.flatnonzero(records.kept))

    _length_table(queries, records, candidates).save(settings.out / TABLE_FOLDER)
    instructions = _tokenized(rows, queries.sets, processor)
    # Written last: this file marks a finished build.
    _write_text(settings.out / INSTRUCTIONS_FILE, instructions.to_json())
    limit = processor.config.prompt.max_text_tokens
    texts = np.concatenate([part.column("text_length") for part in (records, candidates)])
    return Summary(
        queries=len(records.columns),
        candidates=len(candidates.columns),
        sets=queries.sets,
        skipped=reading.skipped,
        longest=int((texts == limit).sum()),
    )


def _description(
    settings: Settings, processor: Processor, inputs: Sequence[Path]
) -> dict[str, Any]:
    """Return the settings that decide the bytes of a build, as JSON values."""
    return {
        "version": _VERSION,
        "root": os.fspath(settings.root.resolve()),
        "sets": sorted(settings.sets),
        "images": settings.images,
        "shard_items": settings.shard_items,
        **prompt_fingerprint(processor),
        "bytes": {path.name: path.stat().st_size for path in inputs},
    }


def _claim(out: Path, description: Mapping[str, Any]) -> None:
    """Create the folder for this build, or check that it holds an unfinished or equal build."""
    file = out / BUILD_FILE
    if file.is_file():
        try:
            found = json.loads(file.read_text("utf-8"))
            different = [name for name, value in description.items() if found[name] != value]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{file} cannot be read: choose another folder") from None
        for name in different:
            raise ConfigError(
                f"{out} was built with {name} {found[name]}, expected {description[name]}: "
                "choose another folder, or delete this one"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not a build of training data: choose another folder"
        )
    try:
        for folder in ("queries", "candidates", PARTS_FOLDER):
            (out / folder).mkdir(parents=True, exist_ok=True)
            for abandoned in (out / folder).glob(".*.partial"):
                abandoned.unlink()
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    _write_text(file, as_json(description))


def _write_table(
    name: TableName,
    lines: Lines,
    settings: Settings,
    write: Callable[[Sequence[Shard]], Iterator[int]],
    reading: Reading,
) -> ShardColumns:
    """Write the missing shards and the TFDS metadata of a table; return all of its columns."""
    shards = _shards(name, lines, settings)
    missing = [shard for shard in shards if not (shard.path.exists() and shard.part.exists())]
    there = len(lines) - sum(len(shard.lines) for shard in missing)
    with Progress(total=len(lines), initial=there, desc=f"building {name}", unit="row") as bar:
        for written in write(missing):
            bar.update(written)
    parts = [ShardColumns.load(shard.part) for shard in shards]
    for message in (message for part in parts for message in part.bad):
        # Includes shards of an earlier run that skipped bad records.
        reject(DataError(message), reading.on_bad_record, reading.skipped)
    if not any(len(part.columns) for part in parts):
        raise DataError(f"{settings.root}: no {name} are left to train on")
    lengths = [len(part.columns) for part in parts]
    write_tfds_metadata(settings.out / name, lengths, plain=name == "queries")
    return ShardColumns.joined(parts)


def _shards(name: TableName, lines: Lines, settings: Settings) -> list[Shard]:
    """Return the shards of a table."""
    size = settings.shard_items
    count = -(-len(lines) // size)
    return [
        Shard(
            table=name,
            path=settings.out / name / shard_name(name, number, count),
            part=settings.out / PARTS_FOLDER / f"{name}-{number:05}-of-{count:05}.npz",
            lines=lines.take(slice(number * size, (number + 1) * size)),
        )
        for number in range(count)
    ]


def _length_table(queries: Queries, records: ShardColumns, candidates: ShardColumns) -> LengthTable:
    """Return the length table; all arguments are in row order."""
    return LengthTable(
        query_tokens=records.column("tokens"),
        query_plain_tokens=records.column("plain_tokens"),
        query_text_length=records.column("text_length"),
        query_height=records.column("height"),
        query_width=records.column("width"),
        query_key=queries.key,
        query_set=queries.set,
        query_task=queries.task,
        candidate_tokens=candidates.column("tokens"),
        candidate_height=candidates.column("height"),
        candidate_width=candidates.column("width"),
        candidate_modality=candidates.column("modality").astype(np.int8),
        positive_start=queries.positives.start,
        positive_row=queries.positives.values,
        negative_start=queries.negatives.start,
        negative_row=queries.negatives.values,
    )


def _tokenized(
    rows: Mapping[InstructionKey, Instruction], sets: tuple[str, ...], processor: Processor
) -> Instructions:
    """Return the instructions with the tokens of every prompt."""
    return Instructions(
        keys=tuple(rows),
        prompts=tuple(
            tuple(Prompt(prompt, processor.tokenize_instruction(prompt)) for prompt in row.prompts)
            for row in rows.values()
        ),
        sets=sets,
    )


def _write_text(path: Path, text: str) -> None:
    """Write a file, which appears complete."""
    try:
        partial = partial_path(path)
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
