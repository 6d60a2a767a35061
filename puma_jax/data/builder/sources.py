"""The lines of a benchmark to train on, and the references between them.

One pass over the files keeps offsets and numbers, no texts. Each record can then be read again on
its own, so that any process can build shards in any order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puma_jax.data.lines import (
    MAX_LINE_BYTES,
    BadRecords,
    Line,
    OnBadRecord,
    located,
    numbered_lines,
    read_records,
    reject,
)
from puma_jax.data.mbeir import parse_candidate, parse_query
from puma_jax.data.mbeir.documents import Documents
from puma_jax.data.mbeir.layout import Benchmark
from puma_jax.data.mbeir.records import (
    Instruction,
    InstructionKey,
    Query,
    dataset_id,
    instruction_key,
)
from puma_jax.data.table import Ragged
from puma_jax.errors import DataError
from puma_jax.progress import Progress
from puma_jax.typing import Int, UInt64, ndarray


@dataclass(frozen=True)
class Lines:
    """Places of records in files, from which they can be read again."""

    files: tuple[Path, ...]
    file: Int[ndarray, "records"]
    """Index in `files`."""
    start: Int[ndarray, "records"]
    """Offset of the line in its file, in bytes."""
    number: Int[ndarray, "records"]
    """Line number in the file, from 1."""
    stamp: UInt64[ndarray, "records"]
    """Stamp of each line; see `stamp_of`."""

    def __len__(self) -> int:
        return len(self.file)

    def take(self, records: Int[ndarray, "taken"] | slice) -> Lines:
        """Return the places of some records."""
        columns = self.file, self.start, self.number, self.stamp
        return Lines(self.files, *(column[records] for column in columns))

    @property
    def fingerprint(self) -> str:
        """A digest of all lines and of the state of their images."""
        return hashlib.sha256(self.stamp.astype("<u8").tobytes()).hexdigest()

    def read(self) -> Iterator[tuple[Path, Line]]:
        """Yield every line with its file.

        Raises:
            DataError: A file can no longer be read.
        """
        opened = {}
        try:
            for file, start, number in zip(self.file, self.start, self.number, strict=True):
                path = self.files[file]
                if path not in opened:
                    opened[path] = open(path, "rb")  # noqa: SIM115 (closed below)
                opened[path].seek(start)
                content = opened[path].readline(MAX_LINE_BYTES + 1)
                yield path, Line(int(number), int(start), content)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        finally:
            for stream in opened.values():
                stream.close()


class _Places:
    """Collects `Lines`."""

    def __init__(self, files: Sequence[Path], root: Path):
        self.files = tuple(files)
        self.root = root
        self.file, self.start, self.number = array("i"), array("q"), array("q")
        self.stamp = array("Q")

    def __len__(self) -> int:
        return len(self.file)

    def add(self, file: int, line: Line, image: str | None) -> None:
        self.file.append(file)
        self.start.append(line.start)
        self.number.append(line.number)
        self.stamp.append(stamp_of(line.content, self.root, image))

    def lines(self) -> Lines:
        return Lines(
            self.files,
            np.array(self.file, np.int32),
            np.array(self.start, np.int64),
            np.array(self.number, np.int64),
            np.array(self.stamp, np.uint64),
        )


class _Lists:
    """Collects ragged lists of document numbers and of their scores."""

    def __init__(self) -> None:
        self.start, self.values, self.scores = array("q", [0]), array("i"), array("f")

    def add(self, dids: Sequence[str], documents: Documents, scores: Mapping[str, float]) -> None:
        self.values.extend(map(documents.number, dids))
        self.scores.extend(scores.get(did, math.nan) for did in dids)
        self.start.append(len(self.values))

    def ragged(self) -> tuple[Ragged, Ragged]:
        """Return the documents of each query, and their scores; NaN where there is none."""
        start = np.array(self.start, np.int64)
        values, scores = np.array(self.values, np.int32), np.array(self.scores, np.float32)
        return Ragged(start, values), Ragged(start, scores)


@dataclass(frozen=True)
class Reading:
    """Where images are, the treatment of bad records, and the count of skipped ones."""

    root: Path
    """Root of the benchmark."""
    on_bad_record: OnBadRecord
    skipped: BadRecords

    def each_line(
        self, files: Sequence[Path], take: Callable[[int, Line], None], what: str
    ) -> None:
        """Call `take` with the file index and the line, for every line that is not blank.

        Raises:
            DataError: A file cannot be read, or `take` raised one and `on_bad_record` is "error".
        """
        total = sum(path.stat().st_size for path in files)
        with Progress(total=total, desc=f"reading {what}", unit="B", unit_scale=True) as bar:
            for index, path in enumerate(files):
                for line in numbered_lines(path):
                    bar.update(len(line.content))
                    if line.content.isspace():
                        continue
                    try:
                        take(index, line)
                    except DataError as error:
                        reject(located(error, path, line.number), self.on_bad_record, self.skipped)


@dataclass(frozen=True)
class Queries:
    """Training queries; documents are given by their numbers in `Documents`."""

    lines: Lines
    key: Int[ndarray, "queries"]
    """Index of the instruction of the query; -1 for none."""
    set: Int[ndarray, "queries"]
    """Index in `sets`."""
    task: Int[ndarray, "queries"]
    """Task id of M-BEIR."""
    positives: Ragged
    negatives: Ragged
    positive_scores: Ragged
    """A teacher's score of each positive; NaN where it has none."""
    negative_scores: Ragged
    sets: tuple[str, ...]

    def take(self, queries: Int[ndarray, "taken"]) -> Queries:
        """Return some of the queries."""
        return Queries(
            self.lines.take(queries),
            self.key[queries],
            self.set[queries],
            self.task[queries],
            self.positives.take(queries),
            self.negatives.take(queries),
            self.positive_scores.take(queries),
            self.negative_scores.take(queries),
            self.sets,
        )

    def renumbered(self, new: Int[ndarray, "numbers"]) -> Queries:
        """Return the queries with new document numbers; documents with number -1 are dropped."""
        changed: dict[str, Any] = {}
        for kind in ("positive", "negative"):
            documents, scores = getattr(self, f"{kind}s"), getattr(self, f"{kind}_scores")
            numbers = new[documents.values].astype(np.int64)
            changed[f"{kind}s"] = Ragged(documents.start, numbers).where(numbers >= 0)
            changed[f"{kind}_scores"] = scores.where(numbers >= 0)
        return dataclasses.replace(self, **changed)


def stamp_of(content: bytes, root: Path, image: str | None) -> int:
    """Return 64 bits that tell one state of a line and its image file from another.

    Image files are told by size and time, as `make` does: they are not read again to find out
    whether they have changed.
    """
    state = "none"
    if image is not None:
        try:
            status = os.stat(root / image)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
    digest = hashlib.blake2b(f"{state}\0".encode(), digest_size=8)
    digest.update(content.rstrip())
    return int.from_bytes(digest.digest())


def query_files(benchmark: Benchmark) -> dict[Path, str]:
    """Return the files of training queries, each with the dataset in its name, "" for the union.

    Raises:
        DataError: There are none.
    """
    if benchmark.union_train:
        return {benchmark.union_train: ""}
    if not benchmark.train:
        raise DataError(
            f"{benchmark.root} has no training queries: there is neither "
            "query/union_train/mbeir_union_up_train.jsonl nor query/train/mbeir_{set}_train.jsonl"
        )
    return {path: name for name, path in benchmark.train.items()}


def pool_files(benchmark: Benchmark) -> tuple[Path, ...]:
    """Return the files that may hold documents for training queries.

    Raises:
        DataError: There are none.
    """
    if "train" in benchmark.global_pools:
        return (benchmark.global_pools["train"],)
    if not benchmark.local_pools:
        raise DataError(
            f"{benchmark.root} has no pool of documents: there is neither "
            "cand_pool/global/mbeir_union_train_cand_pool.jsonl nor any in cand_pool/local"
        )
    return benchmark.local_pools


def find_queries(
    files: Mapping[Path, str],
    instructions: Mapping[InstructionKey, Instruction],
    chosen: Collection[str],
    documents: Documents,
    reading: Reading,
) -> Queries:
    """Return the queries of the chosen sets, and number the documents that they refer to.

    Args:
        files: From `query_files`.
        instructions: From `read_instructions`; their dataset names become the set names of a file
            with several datasets.
        chosen: Names of datasets ("nights") or sets ("nights_task4"); empty chooses all.
        documents: Gives ids their numbers.
        reading: Where images are, and how to treat records that readers refuse and records without
            positives.

    Raises:
        DataError: A file cannot be read, a chosen set has no queries, there are no queries at all,
            or a record is bad and `on_bad_record` is "error".
    """
    names = {dataset: row.dataset_name.lower() for (dataset, *_), row in instructions.items()}
    key_numbers = {key: number for number, key in enumerate(instructions)}
    places, positives, negatives = _Places(tuple(files), reading.root), _Lists(), _Lists()
    keys, sets, tasks = array("i"), array("i"), array("b")
    set_numbers: dict[str, int] = {}
    unseen, known = set(chosen), set()

    def take(file: int, line: Line) -> None:
        query = parse_query(line.content)
        if not query.positives:
            raise DataError("pos_cand_list is empty, but training needs a positive")
        dataset = files[places.files[file]] or _dataset(query, names)
        name = f"{dataset}_task{query.task}" if dataset else f"task{query.task}"
        known.add(name)
        if chosen and not {dataset, name} & set(chosen):
            return
        unseen.difference_update((dataset, name))
        places.add(file, line, query.image)
        keys.append(key_numbers.get(instruction_key(query), -1))
        sets.append(set_numbers.setdefault(name, len(set_numbers)))
        tasks.append(query.task)
        scores = dict(query.scores)
        positives.add(query.positives, documents, scores)
        negatives.add(query.negatives, documents, scores)

    reading.each_line(places.files, take, "queries")
    if unseen:
        raise DataError(
            f'sets: no training query is of "{min(unseen)}"; there are {", ".join(sorted(known))}'
        )
    if not len(places):
        raise DataError(f"{', '.join(map(str, files))}: there is no training query")
    (positive, positive_scores), (negative, negative_scores) = (
        positives.ragged(),
        negatives.ragged(),
    )
    return Queries(
        places.lines(),
        np.array(keys, np.int32),
        np.array(sets, np.int32),
        np.array(tasks, np.int8),
        positive,
        negative,
        positive_scores,
        negative_scores,
        tuple(set_numbers),
    )


def find_candidates(
    files: Sequence[Path], documents: Documents, reading: Reading, *, only_named: bool
) -> tuple[Lines, Int[ndarray, "documents"]]:
    """Return the places of the documents in pools, in the order of the files.

    Of several pools, only those with a document of `documents` are used; a document of several
    lines is taken from the first.

    Args:
        files: From `pool_files`.
        documents: From `find_queries`; other documents are added.
        reading: How to treat records that readers refuse and ids given to two documents.
        only_named: Whether to leave out the documents that no query names.

    Returns:
        The documents, and for every number in `documents` its index among them, -1 for none.

    Raises:
        DataError: A file cannot be read, or a record is bad and `on_bad_record` is "error".
    """
    if len(files) > 1:
        files = [path for path in files if _holds_one_of(path, documents)]
    places = _Places(files, reading.root)
    place_of_number = array("i", [-1]) * len(documents)

    def take(file: int, line: Line) -> None:
        candidate = parse_candidate(line.content)
        if only_named and candidate.did not in documents.numbers:
            return
        if documents.add(candidate, places.files[file], line.number):
            number = documents.number(candidate.did)
            place_of_number.extend([-1] * (number + 1 - len(place_of_number)))
            place_of_number[number] = len(places)
            places.add(file, line, candidate.image)

    reading.each_line(files, take, "candidates")
    return places.lines(), np.array(place_of_number, np.int32)


def drop_unanswerable(queries: Queries, reading: Reading) -> Queries:
    """Return the queries that have a positive among the candidates; the others are bad records.

    Raises:
        DataError: A query has no positive, and `on_bad_record` is "error".
    """
    has_answer = queries.positives.lengths > 0
    lines = queries.lines.take(np.flatnonzero(~has_answer))
    for file, number in zip(lines.file, lines.number, strict=True):
        error = DataError("pos_cand_list: none of its documents is among the candidates")
        path = lines.files[file]
        reject(located(error, path, int(number)), reading.on_bad_record, reading.skipped)
    return queries.take(np.flatnonzero(has_answer))


def _dataset(query: Query, names: Mapping[str, str]) -> str:
    """Return the dataset name of a query, or the dataset id if no instruction names it."""
    dataset = dataset_id(query.qid)
    return names.get(dataset, dataset)


def _holds_one_of(path: Path, documents: Documents) -> bool:
    candidates = read_records(path, parse_candidate, on_bad_record="skip")
    return any(candidate.did in documents.numbers for candidate in candidates)
