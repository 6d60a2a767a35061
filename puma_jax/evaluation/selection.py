"""Select the queries of a split, the documents they search, and the documents that are relevant.

Nothing here depends on the order of files or lines, or on a seed: documents are numbered in the
order of their ids, and every choice depends on a hash of an id.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puma_jax.data.lines import RowIndex
from puma_jax.data.mbeir import (
    Benchmark,
    Candidate,
    EvaluationSet,
    Instruction,
    InstructionKey,
    Query,
    instruction_key,
    modality_code,
    parse_candidate,
    read_instructions,
    read_qrels,
    read_queries,
)
from puma_jax.data.prompts import query_text
from puma_jax.embedder import RawItem
from puma_jax.errors import ConfigError, DataError
from puma_jax.search.corpus import raw_item
from puma_jax.typing import Int, UInt8, ndarray


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
    pool: Int[ndarray, "documents"]
    """Rows of the documents of the local pool, ascending."""


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

    def document(self, row: int) -> RawItem:
        """Return the item to embed for a document.

        Raises:
            DataError: The file of the document can no longer be read.
        """
        file, file_row = self.locations[row].tolist()
        candidate = self.files[file][file_row]
        return raw_item(self.root, candidate.text, candidate.image)

    def reading_order(self) -> Int[ndarray, "documents"]:
        """Return the rows of the representatives, in the order of their files."""
        order = np.lexsort((self.locations[:, 1], self.locations[:, 0]))
        return order[self.representative[order] == order]


def select(benchmark: Benchmark, split: str = "test", limits: Subset | None = None) -> Selection:
    """Return the queries of a split and the documents of its pools.

    The global pool is that of the split, or all local pools joined if the benchmark has none.
    With `limits`, it is always the union of the chosen documents of the local pools, so that it is
    never easier to search than one of them.

    An id names one document, whatever the number of pools and lines that hold it.

    Args:
        benchmark: Files of the benchmark.
        split: Split of the queries.
        limits: How much to use; None uses all.

    Raises:
        DataError: The benchmark has no such split, a file is missing, has a bad record or no
            records, or an id is given to two queries of one set.
    """
    sets = [found for found in benchmark.sets if found.split == split]
    if not sets:
        splits = ", ".join(sorted({found.split for found in benchmark.sets})) or "none"
        raise DataError(
            f'{benchmark.root} has no queries of split "{split}", the splits it has: {splits}'
        )
    for found in sets:
        for path in found.missing:
            raise DataError(f"{path} is missing: {found.name} task {found.task} needs it")
    instructions = read_instructions(benchmark.instructions) if benchmark.instructions else {}

    documents = _Documents()
    selected: list[tuple[EvaluationSet, list[Query], dict[str, set[str]], list[int]]] = []
    for found in sets:
        queries = _queries(found.queries_path, limits)
        relevant: dict[str, set[str]] = {query.qid: set() for query in queries}
        for qrel in read_qrels(found.qrels_path):
            if qrel.qid in relevant:
                relevant[qrel.qid].add(qrel.did)
        always = {did for dids in relevant.values() for did in dids}
        pool = documents.add(found.pool_path, limits.max_candidates if limits else None, always)
        selected.append((found, queries, relevant, pool))
    global_path = None if limits else benchmark.global_pools.get(split)
    union = range(len(documents.dids))
    global_pool = documents.add(global_path, None, ()) if global_path else union

    order = sorted(range(len(documents.dids)), key=documents.dids.__getitem__)
    rows = np.empty(len(order), np.int64)
    rows[order] = np.arange(len(order))
    contents = np.array(documents.contents, np.uint64)[order]
    _, first, group_of = np.unique(contents, return_index=True, return_inverse=True)
    return Selection(
        root=benchmark.root,
        split=split,
        sets=tuple(
            QuerySet(
                name=found.name,
                task=found.task,
                qids=tuple(query.qid for query in queries),
                items=tuple(_query_item(benchmark.root, query, instructions) for query in queries),
                relevant=tuple(
                    tuple(int(rows[number]) for number in documents.known(relevant[query.qid]))
                    for query in queries
                ),
                pool=np.unique(rows[pool]),
            )
            for found, queries, relevant, pool in selected
        ),
        dids=tuple(documents.dids[number] for number in order),
        modalities=np.array(documents.modalities, np.uint8)[order],
        pool=np.unique(rows[global_pool]),
        locations=np.array([documents.files_of, documents.rows_of], np.int64).T[order],
        representative=first[group_of],
        files=tuple(documents.files),
    )


class _Documents:
    """Documents of all pools, numbered in the order in which they are first read."""

    def __init__(self) -> None:
        self.files: list[RowIndex[Candidate]] = []
        self.dids: list[str] = []
        self.numbers: dict[str, int] = {}
        self.modalities, self.files_of, self.rows_of = array("B"), array("q"), array("q")
        self.contents = array("Q")
        """Hashes of text and image. Among ten million documents, the probability of a collision is
        1 in 400,000."""

    def add(self, path: Path, limit: int | None, always: Collection[str]) -> list[int]:
        """Read a pool and return the numbers of its chosen documents.

        Args:
            path: File of the pool.
            limit: Number of documents to choose; None chooses all.
            always: Ids of documents that are chosen in addition.
        """
        index = RowIndex(path, parse_candidate)
        dids, modalities, contents = [], array("B"), array("Q")
        for row in range(len(index)):
            candidate = index[row]
            dids.append(candidate.did)
            modalities.append(modality_code(candidate.modality))
            contents.append(_hash(f"{candidate.image or ''}\0{candidate.text or ''}"))
        if not dids:
            raise DataError(f"{path} holds no documents")
        chosen = None if limit is None else {*hash_sample(dids, limit), *always}
        numbers = []
        for row, did in enumerate(dids):
            if chosen is not None and did not in chosen:
                continue
            if did not in self.numbers:
                self.numbers[did] = len(self.dids)
                self.dids.append(did)
                self.modalities.append(modalities[row])
                self.contents.append(contents[row])
                self.files_of.append(len(self.files))
                self.rows_of.append(row)
            numbers.append(self.numbers[did])
        self.files.append(index)
        return numbers

    def known(self, dids: Iterable[str]) -> list[int]:
        """Return the numbers of the documents that some pool holds."""
        return [self.numbers[did] for did in dids if did in self.numbers]


def _queries(path: Path, limits: Subset | None) -> list[Query]:
    """Return the queries of a file, or a sample of them."""
    queries: dict[str, Query] = {}
    for query in read_queries(path):
        if query.qid in queries:
            raise DataError(f'{path} has two queries of qid "{query.qid}", expected one')
        queries[query.qid] = query
    if not queries:
        raise DataError(f"{path} holds no queries")
    chosen = queries if limits is None else hash_sample(queries, limits.max_queries)
    return [queries[qid] for qid in chosen]


def _query_item(
    root: Path, query: Query, instructions: Mapping[InstructionKey, Instruction]
) -> RawItem:
    """Return the item to embed for a query, with one of its instructions if it has any."""
    found = instructions.get(instruction_key(query))
    instruction = found.prompts[_hash(query.qid) % len(found.prompts)] if found else None
    return raw_item(root, query_text(instruction, query.text) or None, query.image)


def hash_sample(identifiers: Iterable[str], count: int) -> list[str]:
    """Return the `count` ids with the lowest hashes: a sample that does not depend on order."""
    return heapq.nsmallest(count, set(identifiers), key=lambda name: (_hash(name), name))


def _hash(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
