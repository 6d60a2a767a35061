"""Validation of a benchmark: every record, every image, every reference."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from puma_jax.data.lines import (
    BadRecords,
    FilePath,
    OnBadRecord,
    Record,
    located,
    numbered_lines,
    reject,
)
from puma_jax.data.mbeir.documents import Documents, read_image
from puma_jax.data.mbeir.files import (
    parse_candidate,
    parse_qrel,
    parse_query,
    read_instructions,
)
from puma_jax.data.mbeir.layout import Benchmark, EvaluationSet, discover
from puma_jax.data.mbeir.records import (
    TASKS,
    Candidate,
    InstructionKey,
    Modality,
    Query,
    content_key,
    instruction_key,
    negatives_note,
)
from puma_jax.errors import DataError, ImageError


@dataclass
class FileReport:
    """The counts of one file."""

    path: str
    """Relative to the root of the benchmark."""
    records: int = 0
    """Number of good records."""
    bad: int = 0
    """Number of bad records."""
    warnings: Counter[str] = field(default_factory=Counter)
    """Number of occurrences of each warning."""


@dataclass
class Report:
    """The result of `validate`; prints as a table."""

    files: list[FileReport]
    bad: BadRecords
    notes: list[str]
    """Notes on the folder: files that are missing or have unknown names."""

    @property
    def sound(self) -> bool:
        """Whether there are no bad records; warnings and notes are allowed."""
        return self.bad.count == 0

    def __str__(self) -> str:
        width = max(len(file.path) for file in self.files)
        lines = [f"{'file':{width}}  {'records':>9}  {'bad':>7}  {'warnings':>8}"]
        lines += [
            f"{file.path:{width}}  {file.records:>9,}  {file.bad:>7,}  {file.warnings.total():>8,}"
            for file in self.files
        ]
        if self.bad.count:
            lines += ["", f"bad records: {self.bad.count:,}, the first of them:"]
            lines += [f"  {message}" for message in self.bad.messages]
        warned = [file for file in self.files if file.warnings]
        if warned:
            lines += ["", "warnings:"]
            lines += [
                f"  {count:,} × {warning} ({file.path})"
                for file in warned
                for warning, count in file.warnings.items()
            ]
        if self.notes:
            lines += ["", "notes:", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)


def validate(
    root: FilePath, *, on_bad_record: OnBadRecord = "skip", check_images: bool = True
) -> Report:
    """Return a report on every record, image and reference of a benchmark.

    Bad records are records that the readers refuse; ids that name two documents, in one pool or in
    two; ids given to two queries of an evaluation set; queries whose modality contradicts their
    task or whose task contradicts their file; queries with no positive in any pool; training
    queries without positives; images that are missing, cannot be decoded, or lie elsewhere.

    Warnings count what M-BEIR itself has, or what matters to some uses only: positives and judged
    documents that are not in the pool, or whose modality contradicts the task; queries without an
    instruction or a judgment; judgments of unknown queries; documents given twice in one pool;
    training queries given twice, as the upsampled ones of M-BEIR's union are.

    The ids of all documents are kept in memory and, with `check_images`, the paths of all images.

    Args:
        root: Folder of the benchmark.
        on_bad_record: "error" stops at the first bad record, "skip" reports all.
        check_images: Whether to decode every image once; if not, images may be missing.

    Raises:
        DataError: The folder holds no benchmark, a file cannot be read, the table of instructions
            is bad, or a record is bad and `on_bad_record` is "error".
    """
    benchmark = discover(root)
    check = _Check(benchmark, on_bad_record, check_images)
    local_pools = {path: check.pool(path) for path in benchmark.local_pools}
    for path in benchmark.global_pools.values():
        check.pool(path)
    for evaluation_set in benchmark.sets:
        check.evaluation_set(evaluation_set, local_pools.get(evaluation_set.pool_path))
    for path in benchmark.train.values():
        check.queries(path)
    if benchmark.union_train:
        check.queries(benchmark.union_train)
    for path in benchmark.qrels:
        if path not in check.files:
            check.qrels(path)
    notes = _notes(benchmark)
    if check.negatives:
        notes.append(negatives_note(check.with_negatives, check.negatives))
    return Report(list(check.files.values()), check.bad, notes)


def _notes(benchmark: Benchmark) -> list[str]:
    """Return notes on files that are missing or unknown."""

    def name(path: Path) -> str:
        return path.relative_to(benchmark.root).as_posix()

    notes = [f"{name(path)} is missing" for found in benchmark.sets for path in found.missing]
    if benchmark.instructions is None:
        notes.append("instructions/query_instructions.tsv is missing")
    notes += [
        f"{name(path)} is not used: its name does not fit the layout" for path in benchmark.unknown
    ]
    return notes


class _Check:
    """The state of a validation: pools are read first, then the files that refer to them."""

    def __init__(self, benchmark: Benchmark, on_bad_record: OnBadRecord, check_images: bool):
        self.root = benchmark.root
        self.on_bad_record = on_bad_record
        self.check_images = check_images
        self.bad = BadRecords()
        self.files: dict[Path, FileReport] = {}
        self.documents = Documents()  # of all pools
        self.modalities: dict[str, Modality] = {}
        self.with_negatives = self.negatives = 0
        self.decoded: set[str] = set()  # images; local and global pools share them
        self.instructions: set[InstructionKey] | None = None
        if benchmark.instructions:
            self.instructions = set(read_instructions(benchmark.instructions))

    def pool(self, path: Path) -> set[str]:
        """Check a pool and return the ids of its documents."""
        dids: set[str] = set()

        def parse(line: bytes, number: int) -> Candidate:
            candidate = parse_candidate(line)
            self._check_image("img_path", candidate.image)
            self.documents.add(candidate, path, number)
            return candidate

        for candidate in self._records(path, parse):
            did = sys.intern(candidate.did)  # one copy of each, whatever the number of pools
            if did in dids:
                self._warn(path, "document given twice")
            dids.add(did)
            self.modalities[did] = candidate.modality
        return dids

    def evaluation_set(self, evaluation_set: EvaluationSet, pool: set[str] | None) -> None:
        """Check the queries and judgments of a set, and that they refer to each other."""
        path = evaluation_set.queries_path
        queries = self.queries(path, evaluation_set.task, pool)
        if evaluation_set.qrels_path.is_file():
            answered = self.qrels(evaluation_set.qrels_path, queries, pool)
            for _ in queries - answered:
                self._warn(path, "query without a relevant document in the qrels")

    def queries(
        self, path: Path, task: int | None = None, pool: set[str] | None = None
    ) -> set[str]:
        """Check the queries of an evaluation set (one task) or of training; return their ids."""
        contents: dict[str, int] = {}

        def parse(line: bytes, _: int) -> Query:
            query = parse_query(line)
            if task is not None and query.qid in contents:
                raise DataError(f'qid "{query.qid}" is given twice')
            _check_task(query, task)
            if task is None and not query.positives:
                raise DataError("pos_cand_list is empty, but training needs a positive")
            self._check_positives(query)
            self._check_image("query_img_path", query.image)
            return query

        for query in self._records(path, parse):
            content, given = content_key(query.text, query.image), query.qid in contents
            if contents.setdefault(query.qid, content) != content:
                self._warn(path, "qid of another query, too")
            elif given:
                self._warn(path, "training query given twice (upsampled)")
            if task is None and query.negatives:
                self.with_negatives += 1
                self.negatives += len(query.negatives)
            self._warn_of_positives(path, query, pool)
            dataset, modality, target = key = instruction_key(query)
            if self.instructions is not None and key not in self.instructions:
                kind = f'dataset_id "{dataset}", {modality} → {target}'
                self._warn(path, f"query without an instruction for {kind}")
        return set(contents)

    def qrels(
        self, path: Path, queries: set[str] | None = None, pool: set[str] | None = None
    ) -> set[str]:
        """Check judgments against queries and pool, and return the ids of answered queries."""
        answered = set()
        for qrel in self._records(path, lambda line, _: parse_qrel(line)):
            if qrel.relevance > 0:
                answered.add(qrel.qid)
            if queries is not None and qrel.qid not in queries:
                self._warn(path, "judgment of an unknown query")
            if pool is not None and qrel.did not in pool:
                self._warn(path, "judged document is not in the local pool")
        return answered

    def _records(self, path: Path, parse: Callable[[bytes, int], Record]) -> Iterator[Record]:
        """Yield the good records of a file; count these and the bad ones.

        Args:
            path: The file.
            parse: Returns the record of a line, given its content and number, or raises DataError.
        """
        file = self.files[path] = FileReport(path.relative_to(self.root).as_posix())
        for line in numbered_lines(path):
            if line.content.isspace():
                continue
            try:
                record = parse(line.content, line.number)
            except DataError as error:
                file.bad += 1
                reject(located(error, path, line.number), self.on_bad_record, self.bad)
                continue
            file.records += 1
            yield record

    def _warn(self, path: Path, warning: str) -> None:
        self.files[path].warnings[warning] += 1

    def _warn_of_positives(self, path: Path, query: Query, pool: set[str] | None) -> None:
        target = TASKS[query.task][1]
        for did in query.positives:
            if did not in self.modalities:
                self._warn(path, "positive is in no pool")
            elif self.modalities[did] != target:
                self._warn(path, "positive has another modality than the task")
            elif pool is not None and did not in pool:
                self._warn(path, "positive is not in the local pool")

    def _check_positives(self, query: Query) -> None:
        known = self.modalities
        if known and query.positives and not any(did in known for did in query.positives):
            raise DataError(
                f'pos_cand_list: neither "{query.positives[0]}" nor what follows is in any pool'
            )

    def _check_image(self, name: str, image: str | None) -> None:
        if image is None or not self.check_images or image in self.decoded:
            return
        try:
            read_image(self.root, name, image)
        except ImageError as error:
            raise DataError(str(error)) from error
        self.decoded.add(image)


def _check_task(query: Query, task: int | None) -> None:
    """Refuse a query whose task is not that of its file, or whose modality is not of its task."""
    if task is not None and query.task != task:
        raise DataError(f"task_id {query.task} in a file of task {task}")
    expected = TASKS[query.task][0]
    if query.modality != expected:
        raise DataError(
            f'query_modality is "{query.modality}", but queries of task {query.task} are '
            f'"{expected}"'
        )
