"""The folder of a build: claimed, written where something is missing, and marked as finished."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from puma_jax import artifacts
from puma_jax.data.builder.settings import Settings
from puma_jax.data.builder.shards import Shard, ShardColumns
from puma_jax.data.builder.sources import Lines, Reading
from puma_jax.data.examples import write_tfds_metadata
from puma_jax.data.lines import reading, reject
from puma_jax.data.store import (
    BUILD_FILE,
    INSTRUCTIONS_FILE,
    PARTS_FOLDER,
    TABLE_FOLDER,
    Finished,
    Instructions,
    TableName,
    build_digest,
    shard_name,
)
from puma_jax.data.table import LengthTable
from puma_jax.errors import ConfigError, DataError
from puma_jax.files import Digest
from puma_jax.progress import Progress
from puma_jax.schema import from_json


def claim(out: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Make the folder that of a build, or check that it is; return its build.json."""
    return artifacts.claim(
        out, BUILD_FILE, job, what="training data", adopt={"finished": lambda: None}
    )


class Output:
    """The folder of a build, which is not finished as long as anything in it is being written."""

    def __init__(self, settings: Settings, job: Mapping[str, Any]):
        """Wrap a folder that `claim` has made that of the job, and that no other process writes."""
        self.settings = settings
        self.out = settings.out
        self.job = job
        self.lengths: dict[str, list[int]] = {}
        self.written = 0
        self.reopened = False
        self.finished = self._finished(claim(settings.out, job)["finished"])

    def prepare(self) -> None:
        """Make the folders, and remove what killed processes left half written."""
        with artifacts.writing(self.out):
            for name in ("queries", "candidates", PARTS_FOLDER, TABLE_FOLDER):
                (self.out / name).mkdir(exist_ok=True)
                for path in (self.out / name).iterdir():
                    if artifacts.is_partial(path):
                        path.unlink()

    def digests(self, inputs: Sequence[Path]) -> dict[str, Digest]:
        """Return the digest of each file that is read; one that is as it was is not read again."""
        digests = {}
        for path in inputs:
            name = path.relative_to(self.settings.root).as_posix()
            known = self.finished.inputs.get(name) if self.finished else None
            with reading(path):
                digests[name] = Digest.of(path, known)
        return digests

    def write_table(
        self,
        name: TableName,
        lines: Lines,
        write: Callable[[Sequence[Shard]], Iterator[int]],
        source: Reading,
    ) -> ShardColumns:
        """Write the missing shards and the TFDS metadata of a table; return all of its columns."""
        shards = _shards(name, lines, self.settings)
        missing = [shard for shard in shards if not shard.is_written()]
        if missing:
            self._reopen()
        there = len(lines) - sum(len(shard.lines) for shard in missing)
        with Progress(total=len(lines), initial=there, desc=f"building {name}", unit="row") as bar:
            for written in write(missing):
                bar.update(written)
        self.written += len(missing)
        self._remove_others(name, shards)
        parts = [ShardColumns.load(shard.part) for shard in shards]
        for message in (message for part in parts for message in part.bad):
            # Includes shards of an earlier run that skipped bad records.
            reject(DataError(message), source.on_bad_record, source.skipped)
        if not any(len(part.columns) for part in parts):
            raise DataError(f"{self.settings.root}: no {name} are left to train on")
        self.lengths[name] = [len(part.columns) for part in parts]
        return ShardColumns.joined(parts)

    def finish(
        self, table: LengthTable, instructions: Instructions, inputs: dict[str, Digest]
    ) -> None:
        """Write the table and the instructions, and mark the build as finished."""
        digests = {}
        columns = ((f"{TABLE_FOLDER}/{name}", content) for name, content in table.files())
        for name, content in ((INSTRUCTIONS_FILE, instructions.to_json().encode()), *columns):
            digests[name] = hashlib.sha256(content).hexdigest()
            path = self.out / name
            if not path.is_file() or path.read_bytes() != content:
                self._reopen()
                with artifacts.atomic_file(path) as partial:
                    partial.write_bytes(content)
        shards = {name: tuple(lengths) for name, lengths in self.lengths.items()}
        finished = Finished(inputs, shards, digests, "")
        finished = replace(finished, sha256=build_digest(self.job, asdict(finished)))
        if finished != self.finished:
            for name, lengths in self.lengths.items():
                write_tfds_metadata(self.out / name, lengths, plain=name == "queries")
            artifacts.write_json(self.out / BUILD_FILE, {**self.job, "finished": asdict(finished)})

    def _finished(self, value: Any) -> Finished | None:
        """Return what was finished, None for nothing or for what is damaged and written again."""
        try:
            finished = from_json(Finished, value)
        except ConfigError:
            return None
        return finished if finished.sha256 == build_digest(self.job, value) else None

    def _reopen(self) -> None:
        """Take back that the build is finished, before anything in it changes."""
        if not self.reopened:
            self.reopened = True
            self.finished = None
            artifacts.write_json(self.out / BUILD_FILE, {**self.job, "finished": None})

    def _remove_others(self, name: TableName, shards: Sequence[Shard]) -> None:
        """Remove the shards of a build that had another number of them."""
        kept = {path for shard in shards for path in (shard.path, shard.part)}
        with artifacts.writing(self.out):
            for path in (
                *(self.out / name).glob(f"{name}-train.array_record-*"),
                *(self.out / PARTS_FOLDER).glob(f"{name}-*.npz"),
            ):
                if path not in kept:
                    self._reopen()
                    path.unlink()


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
