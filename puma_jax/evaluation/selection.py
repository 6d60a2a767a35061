"""Select the queries of a split, the documents they search, and the documents that are relevant.

Nothing here depends on the order of files or lines, or on a seed: documents are numbered in the
order of their ids, and every choice depends on a hash of an id. What is left out is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from puma_jax.data.lines import BadRecords, OnBadRecord, RowIndex, located, reject
from puma_jax.data.mbeir import (
    Benchmark,
    Candidate,
    EvaluationSet,
    Instruction,
    InstructionKey,
    Query,
    instruction_key,
    read_instructions,
    read_qrels,
    read_queries,
)
from puma_jax.embedder import RawItem
from puma_jax.errors import ConfigError, DataError
from puma_jax.evaluation.documents import Pools, hash_of, hash_sample
from puma_jax.evaluation.report import LeftOut
from puma_jax.search.corpus import raw_item
from puma_jax.typing import Bool, Int, UInt8, ndarray


@dataclass(frozen=True, slots=True)
class Subset:
    """How much of a benchmark to use, for evaluation during training."""

    max_queries: int
    """Number of queries of each set."""
    max_candidates: int
    """Number of documents of each local pool, besides those relevant to the chosen queries."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: A number is below 1.
        """
        if self.max_queries < 1 or self.max_candidates < 1:
            raise ConfigError(
                f"a subset of {self.max_queries} queries and {self.max_candidates} candidates, "
                "expected at least 1 of both"
            )


@dataclass(frozen=True)
class QuerySet:
    """The queries of one dataset and task, their local pool, and their relevant documents."""

    name: str
    task: int
    qids: tuple[str, ...]
    items: tuple[RawItem, ...]
    """The item to embed for each query, its instruction included."""
    relevant: tuple[tuple[int, ...], ...]
    """Rows of the documents relevant to each query; those that are in no pool are left out."""
    missing: Int[ndarray, "queries"]
    """Number of documents relevant to each query that are in no pool."""
    instructed: Bool[ndarray, "queries"]
    """Whether each query has an instruction."""
    pool: Int[ndarray, "documents"]
    """Rows of the documents of the local pool, ascending."""
    file: str
    """Name of the file of the queries."""
    unused_judgments: int = 0
    """Relevant judgments of queries that are not in the file."""
    skipped_queries: int = 0
    skipped_documents: int = 0

    def readable(
        self, queries: Bool[ndarray, "queries"], documents: Bool[ndarray, "documents"]
    ) -> QuerySet:
        """Return the set without what cannot be read, which is counted.

        Args:
            queries: Which queries can be read.
            documents: Which documents of the selection can be read.

        Raises:
            DataError: No query or no document is left.
        """
        kept, pool = np.flatnonzero(queries).tolist(), self.pool[documents[self.pool]]
        for left, kind in ((kept, "queries"), (pool, "documents")):
            if not len(left):
                raise DataError(f"{self.file}: no {kind} of {self.name} task {self.task} are left")
        return replace(
            self,
            qids=tuple(self.qids[query] for query in kept),
            items=tuple(self.items[query] for query in kept),
            relevant=tuple(self.relevant[query] for query in kept),
            missing=self.missing[kept],
            instructed=self.instructed[kept],
            pool=pool,
            skipped_queries=self.skipped_queries + len(self.qids) - len(kept),
            skipped_documents=self.skipped_documents + len(self.pool) - len(pool),
        )

    def left_out(self) -> LeftOut:
        """Return the counts of what the numbers of this set leave out."""
        judged = np.array([len(rows) for rows in self.relevant]) + self.missing
        return LeftOut(
            unjudged_queries=int((judged == 0).sum()),
            uninstructed_queries=int((~self.instructed).sum()),
            missing_documents=int(self.missing.sum()),
            unused_judgments=self.unused_judgments,
            skipped_queries=self.skipped_queries,
            skipped_documents=self.skipped_documents,
        )


@dataclass(frozen=True)
class Selection:
    """Queries and documents of a split, ready to embed; documents are read when needed."""

    root: Path
    split: str
    sets: tuple[QuerySet, ...]
    dids: tuple[str, ...]
    """Ids of all documents, ascending; other fields name a document by its row in this tuple."""
    modalities: UInt8[ndarray, "documents"]
    """Code of the modality of each document; see `mbeir.modality_code`."""
    pool: Int[ndarray, "documents_of_pool"]
    """Rows of the documents of the global pool, ascending."""
    locations: Int[ndarray, "documents 2"]
    """Number of the file and row within it of each document."""
    representative: Int[ndarray, "documents"]
    """Row of the first document with the same text and image, whose vector stands for all of them:
    equal documents then have equal scores whatever the rounding, and are ordered by their ids."""
    files: tuple[RowIndex[Candidate], ...]
    unused_files: tuple[str, ...]
    """Files of this split, relative to the root, whose names are not of the layout."""
    skipped: BadRecords
    """The bad records that were left out."""

    def document(self, row: int) -> RawItem:
        """Return the item to embed for a document.

        Raises:
            DataError: The file of the document can no longer be read.
        """
        file, file_row = self.locations[row].tolist()
        candidate = self.files[file][file_row]
        return raw_item(self.root, candidate.text, candidate.image)

    def document_error(self, row: int, error: Exception) -> DataError:
        """Return an error with the file, line and id of its document before the message."""
        file, file_row = self.locations[row].tolist()
        named = DataError(f'document "{self.dids[row]}": {error}')
        return located(named, self.files[file].path, int(self.files[file].line_numbers[file_row]))

    def reading_order(self) -> Int[ndarray, "documents"]:
        """Return the rows of the representatives, in the order of their files."""
        order = np.lexsort((self.locations[:, 1], self.locations[:, 0]))
        return order[self.representative[order] == order]


def select(
    benchmark: Benchmark,
    split: str = "test",
    limits: Subset | None = None,
    *,
    on_bad_record: OnBadRecord = "error",
) -> Selection:
    """Return the queries of a split and the documents of its pools.

    The global pool is that of the split, or all local pools joined if the benchmark has none.
    With `limits`, it is always the union of the chosen documents of the local pools, so that it is
    never easier to search than one of them.

    An id names one document, whatever the number of pools and lines that hold it.

    Args:
        benchmark: Files of the benchmark.
        split: Split of the queries.
        limits: How much to use; None uses all.
        on_bad_record: "error" stops at a bad record, "skip" leaves it out and counts it.

    Raises:
        DataError: The benchmark has no such split, a file is missing, has a bad record or no
            records, or an id is given to two queries of one set, or to two documents.
    """
    sets = sets_of(benchmark, split)
    for found in sets:
        for path in found.missing:
            raise DataError(f"{path} is missing: {found.name} task {found.task} needs it")
    instructions = read_instructions(benchmark.instructions) if benchmark.instructions else {}
    pools = Pools(on_bad_record)
    read = [_read_set(found, limits, pools) for found in sets]
    global_path = None if limits else benchmark.global_pools.get(split)
    chosen = {number for of_set in read for number in of_set.pool}
    global_pool = pools.add(global_path) if global_path else list(chosen)
    dids = list(pools.ids.numbers)
    order = sorted(chosen.union(global_pool), key=dids.__getitem__)
    rows = np.full(len(dids), -1, np.int64)
    rows[order] = np.arange(len(order))
    contents = np.array(pools.contents, np.uint64)[order]
    _, first, group_of = np.unique(contents, return_index=True, return_inverse=True)
    return Selection(
        root=benchmark.root,
        split=split,
        sets=tuple(
            _query_set(benchmark.root, of_set, pools.ids.numbers, rows, instructions)
            for of_set in read
        ),
        dids=tuple(dids[number] for number in order),
        modalities=np.array(pools.modalities, np.uint8)[order],
        pool=np.unique(rows[global_pool]),
        locations=np.array([pools.files_of, pools.rows_of], np.int64).T[order],
        representative=first[group_of],
        files=tuple(pools.files),
        unused_files=_unused_files(benchmark, split),
        skipped=pools.skipped,
    )


def sets_of(benchmark: Benchmark, split: str) -> tuple[EvaluationSet, ...]:
    """Return the evaluation sets of a split.

    Raises:
        DataError: There are none.
    """
    sets = tuple(found for found in benchmark.sets if found.split == split)
    if not sets:
        splits = ", ".join(sorted({found.split for found in benchmark.sets})) or "none"
        raise DataError(
            f'{benchmark.root} has no queries of split "{split}", the splits it has: {splits}'
        )
    return sets


def count_queries(benchmark: Benchmark, split: str) -> int:
    """Return the number of queries of a split, bad records left out; 0 if it has none."""
    return sum(
        1
        for found in benchmark.sets
        if found.split == split
        for _ in read_queries(found.queries_path, on_bad_record="skip")
    )


@dataclass(frozen=True)
class _ReadSet:
    """Content of the files of an evaluation set."""

    files: EvaluationSet
    queries: list[Query]
    relevant: dict[str, set[str]]
    """Ids of the documents relevant to each query."""
    pool: list[int]
    """Numbers of the documents of the local pool."""
    unused_judgments: int
    skipped_queries: int
    skipped_documents: int


def _read_set(found: EvaluationSet, limits: Subset | None, pools: Pools) -> _ReadSet:
    """Return what the files of a set hold."""
    on_bad_record, skipped = pools.on_bad_record, pools.skipped
    before = skipped.count
    queries: dict[str, Query] = {}
    for query in read_queries(found.queries_path, on_bad_record=on_bad_record, skipped=skipped):
        if query.qid in queries:
            message = f'{found.queries_path} has two queries of qid "{query.qid}", expected one'
            reject(DataError(message), on_bad_record, skipped)
            continue
        queries[query.qid] = query
    if not queries:
        raise DataError(f"{found.queries_path} holds no queries")
    skipped_queries = skipped.count - before
    chosen = queries if limits is None else hash_sample(queries, limits.max_queries)
    relevant: dict[str, set[str]] = {qid: set() for qid in chosen}
    unused = 0
    for qrel in read_qrels(found.qrels_path, on_bad_record=on_bad_record, skipped=skipped):
        unused += qrel.qid not in queries
        if qrel.qid in relevant:
            relevant[qrel.qid].add(qrel.did)
    always = {did for dids in relevant.values() for did in dids}
    before = skipped.count
    pool = pools.add(found.pool_path, limits.max_candidates if limits else None, always)
    return _ReadSet(
        files=found,
        queries=[queries[qid] for qid in chosen],
        relevant=relevant,
        pool=pool,
        unused_judgments=unused,
        skipped_queries=skipped_queries,
        skipped_documents=skipped.count - before,
    )


def _query_set(
    root: Path,
    found: _ReadSet,
    numbers: Mapping[str, int],
    rows: Int[ndarray, "documents"],
    instructions: Mapping[InstructionKey, Instruction],
) -> QuerySet:
    """Return a set with its documents by their rows.

    Args:
        root: Folder of the benchmark.
        found: What the files of the set hold.
        numbers: Number of each id.
        rows: Row in the selection of each number; -1 for documents that are not chosen.
        instructions: Instructions of queries.
    """
    relevant, missing = [], []
    for query in found.queries:
        dids = found.relevant[query.qid]
        known = rows[[numbers[did] for did in dids if did in numbers]]
        relevant.append(tuple(np.sort(known[known >= 0]).tolist()))
        missing.append(len(dids) - len(relevant[-1]))
    return QuerySet(
        name=found.files.name,
        task=found.files.task,
        qids=tuple(query.qid for query in found.queries),
        items=tuple(query_item(root, query, instructions) for query in found.queries),
        relevant=tuple(relevant),
        missing=np.array(missing),
        instructed=np.array([instruction_key(query) in instructions for query in found.queries]),
        pool=np.unique(rows[found.pool]),
        file=found.files.queries_path.name,
        unused_judgments=found.unused_judgments,
        skipped_queries=found.skipped_queries,
        skipped_documents=found.skipped_documents,
    )


def query_item(
    root: Path, query: Query, instructions: Mapping[InstructionKey, Instruction]
) -> RawItem:
    """Return the item to embed for a query, with one of its instructions if it has any."""
    found = instructions.get(instruction_key(query))
    instruction = found.prompts[hash_of(query.qid) % len(found.prompts)] if found else None
    item = raw_item(root, query.text, query.image)
    return item if instruction is None else {**item, "instruction": instruction}


def _unused_files(benchmark: Benchmark, split: str) -> tuple[str, ...]:
    """Return the files of a split whose names are not of the layout, relative to the root."""
    folders = (f"query/{split}", f"qrels/{split}", "cand_pool/local", "cand_pool/global")
    names = [path.relative_to(benchmark.root) for path in benchmark.unknown]
    return tuple(name.as_posix() for name in names if name.parent.as_posix() in folders)
