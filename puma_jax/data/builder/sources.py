"""The lines of a benchmark to train on, and the references between them.

One pass over the files keeps offsets and numbers, no texts. Each record can then be read again on
its own, so that any process can build shards in any order.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from puma_jax.typing import Int, ndarray

Ids = dict[str, int]
"""Number of each document id. The 5.6 million documents of M-BEIR take about 1 GB."""


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

    def __len__(self) -> int:
        return len(self.file)

    def take(self, records: Int[ndarray, "taken"] | slice) -> Lines:
        """Return the places of some records."""
        return Lines(self.files, self.file[records], self.start[records], self.number[records])

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

    def __init__(self, files: Sequence[Path]):
        self.files = tuple(files)
        self.file, self.start, self.number = array("i"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self.file)

    def add(self, file: int, line: Line) -> None:
        self.file.append(file)
        self.start.append(line.start)
        self.number.append(line.number)

    def lines(self) -> Lines:
        return Lines(
            self.files,
            np.array(self.file, np.int32),
            np.array(self.start, np.int64),
            np.array(self.number, np.int64),
        )


class _Lists:
    """Collects ragged lists of document numbers."""

    def __init__(self) -> None:
        self.start, self.values = array("q", [0]), array("i")

    def add(self, dids: Sequence[str], ids: Ids) -> None:
        self.values.extend(ids.setdefault(did, len(ids)) for did in dids)
        self.start.append(len(self.values))

    def ragged(self) -> Ragged:
        return Ragged(np.array(self.start, np.int64), np.array(self.values, np.int32))


@dataclass(frozen=True)
class Reading:
    """The treatment of bad records, and the count of skipped ones."""

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
    """Training queries; documents are given by their numbers in `Ids`."""

    lines: Lines
    key: Int[ndarray, "queries"]
    """Index of the instruction of the query; -1 for none."""
    set: Int[ndarray, "queries"]
    """Index in `sets`."""
    task: Int[ndarray, "queries"]
    """Task id of M-BEIR."""
    positives: Ragged
    negatives: Ragged
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
            self.sets,
        )

    def renumbered(self, new: Int[ndarray, "numbers"]) -> Queries:
        """Return the queries with new document numbers; documents with number -1 are dropped."""

        def renumber(documents: Ragged) -> Ragged:
            numbers = new[documents.values].astype(np.int64)
            return Ragged(documents.start, numbers).where(numbers >= 0)

        positives, negatives = renumber(self.positives), renumber(self.negatives)
        return dataclasses.replace(self, positives=positives, negatives=negatives)


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
    ids: Ids,
    reading: Reading,
) -> Queries:
    """Return the queries of the chosen sets, and number the documents that they refer to.

    Args:
        files: From `query_files`.
        instructions: From `read_instructions`; their dataset names become the set names of a file
            with several datasets.
        chosen: Names of datasets ("nights") or sets ("nights_task4"); empty chooses all.
        ids: Document numbers; new documents are added.
        reading: How to treat records that readers refuse and records without positives.

    Raises:
        DataError: A file cannot be read, a chosen set has no queries, there are no queries at all,
            or a record is bad and `on_bad_record` is "error".
    """
    names = {dataset: row.dataset_name.lower() for (dataset, *_), row in instructions.items()}
    key_numbers = {key: number for number, key in enumerate(instructions)}
    places, positives, negatives = _Places(tuple(files)), _Lists(), _Lists()
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
        places.add(file, line)
        keys.append(key_numbers.get(instruction_key(query), -1))
        sets.append(set_numbers.setdefault(name, len(set_numbers)))
        tasks.append(query.task)
        positives.add(query.positives, ids)
        negatives.add(query.negatives, ids)

    reading.each_line(places.files, take, "queries")
    if unseen:
        raise DataError(
            f'sets: no training query is of "{min(unseen)}"; there are {", ".join(sorted(known))}'
        )
    if not len(places):
        raise DataError(f"{', '.join(map(str, files))}: there is no training query")
    return Queries(
        places.lines(),
        np.array(keys, np.int32),
        np.array(sets, np.int32),
        np.array(tasks, np.int8),
        positives.ragged(),
        negatives.ragged(),
        tuple(set_numbers),
    )


def find_candidates(
    files: Sequence[Path], ids: Ids, reading: Reading, *, only_named: bool
) -> tuple[Lines, Int[ndarray, "documents"]]:
    """Return the places of the documents in pools, in the order of the files.

    Of several pools, only those with a document of `ids` are used; a document in several pools is
    taken from the first.

    Args:
        files: From `pool_files`.
        ids: From `find_queries`; numbers of other documents are added.
        reading: How to treat records that readers refuse and ids given twice in one file.
        only_named: Whether to leave out the documents that were not in `ids`.

    Returns:
        The documents, and for every number in `ids` its index among them, -1 for none.

    Raises:
        DataError: A file cannot be read, or a record is bad and `on_bad_record` is "error".
    """
    if len(files) > 1:
        files = [path for path in files if _holds_one_of(path, ids)]
    places = _Places(files)
    place_of_id = array("i", [-1]) * len(ids)
    first_of_file: dict[int, int] = {}

    def take(file: int, line: Line) -> None:
        did = parse_candidate(line.content).did
        first = first_of_file.setdefault(file, len(places))
        if only_named and did not in ids:
            return
        number = ids.setdefault(did, len(ids))
        if number == len(place_of_id):
            place_of_id.append(-1)
        if place_of_id[number] >= first:
            raise DataError(f'did "{did}" is given twice')
        if place_of_id[number] < 0:
            place_of_id[number] = len(places)
            places.add(file, line)

    reading.each_line(files, take, "candidates")
    return places.lines(), np.array(place_of_id, np.int32)


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


def _holds_one_of(path: Path, ids: Ids) -> bool:
    candidates = read_records(path, parse_candidate, on_bad_record="skip")
    return any(candidate.did in ids for candidate in candidates)
