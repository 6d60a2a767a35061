"""Training queries with all documents, their known answers, and what they are embedded from.

Records are read from their files when needed: memory holds a few numbers for each, and the ids.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puma_jax.data.builder.sources import pool_files, query_files
from puma_jax.data.lines import BadRecords, OnBadRecord, RowIndex, located, reject
from puma_jax.data.mbeir import (
    TASKS,
    Benchmark,
    Candidate,
    Instruction,
    InstructionKey,
    Query,
    content_key,
    modality_code,
    parse_query,
    read_instructions,
    read_qrels,
)
from puma_jax.data.table import Ragged
from puma_jax.embedder import RawItem
from puma_jax.errors import DataError
from puma_jax.evaluation.documents import Pools
from puma_jax.evaluation.selection import query_item
from puma_jax.search.corpus import raw_item
from puma_jax.typing import Int, ndarray


@dataclass(frozen=True)
class TrainingSet:
    """Queries and documents, by their rows; answers are told by content, not by id."""

    root: Path
    instructions: dict[InstructionKey, Instruction]
    query_files: tuple[RowIndex[Query], ...]
    locations: Int[ndarray, "queries 2"]
    """Number of the file and row within it of each query."""
    targets: Int[ndarray, "queries"]
    """Code of the modality that each query asks for."""
    answers: Ragged
    """Documents that answer each query: positives of all queries of its id, and its qrels."""
    known: Ragged
    """The same, and the document that holds what the query holds."""
    dids: tuple[str, ...]
    modalities: Int[ndarray, "documents"]
    pools: tuple[RowIndex[Candidate], ...]
    document_locations: Int[ndarray, "documents 2"]
    representative: Int[ndarray, "documents"]
    """Row of the first document with the same content; other fields name documents by it."""
    unused_pools: tuple[Path, ...]
    """Pools without an answer, whose documents are not used."""
    skipped: BadRecords
    """The bad records that were left out."""

    def __len__(self) -> int:
        return len(self.locations)

    def unique_documents(self) -> Int[ndarray, "contents"]:
        """Return the rows of the documents to embed, each content once, in the order of pools."""
        own = np.flatnonzero(self.representative == np.arange(len(self.dids)))
        unused = [
            number for number, pool in enumerate(self.pools) if pool.path in self.unused_pools
        ]
        return own[~np.isin(self.document_locations[own, 0], unused)]

    def query(self, row: int) -> Query:
        """Return the query of a row."""
        file, file_row = self.locations[row].tolist()
        return self.query_files[file][file_row]

    def qid(self, row: int) -> str:
        """Return the id of a query."""
        return self.query(row).qid

    def query_item(self, row: int) -> RawItem:
        """Return the item to embed for a query, with an instruction if it has any."""
        return query_item(self.root, self.query(row), self.instructions)

    def query_error(self, row: int, error: Exception) -> DataError:
        """Return an error with the file, line and id of its query before the message."""
        file, file_row = self.locations[row].tolist()
        index = self.query_files[file]
        named = DataError(f'query "{self.qid(row)}": {error}')
        return located(named, index.path, int(index.line_numbers[file_row]))

    def document(self, row: int) -> RawItem:
        """Return the item to embed for a document."""
        file, file_row = self.document_locations[row].tolist()
        candidate = self.pools[file][file_row]
        return raw_item(self.root, candidate.text, candidate.image)

    def document_error(self, row: int, error: Exception) -> DataError:
        """Return an error with the file, line and id of its document before the message."""
        file, file_row = self.document_locations[row].tolist()
        index = self.pools[file]
        named = DataError(f'document "{self.dids[row]}": {error}')
        return located(named, index.path, int(index.line_numbers[file_row]))


def read_training_set(benchmark: Benchmark, on_bad_record: OnBadRecord = "error") -> TrainingSet:
    """Return the training queries of a benchmark with all documents that they may find.

    Of several pools, only those with an answer are used.

    Raises:
        DataError: There are no training queries or no documents, a file cannot be read, or a record
            is bad and `on_bad_record` is "error".
    """
    pools = Pools(on_bad_record)
    for path in pool_files(benchmark):
        pools.add(path)
    contents = np.frombuffer(pools.contents, np.uint64)
    known_contents, first, group = np.unique(contents, return_index=True, return_inverse=True)
    representative = first[group]
    reader = _QueryReader(pools, representative, known_contents, first, on_bad_record)
    files = tuple(RowIndex(path, parse_query) for path in query_files(benchmark))
    for number, index in enumerate(files):
        reader.read(number, index)
    for path in benchmark.qrels:
        if path.parent.name in ("train", "union_train"):
            reader.judge(path)
    if not len(reader.rows):
        raise DataError(f"{', '.join(str(index.path) for index in files)}: there is no query")
    answers, known = reader.answers()
    locations = np.stack([np.frombuffer(of, np.int64) for of in (pools.files_of, pools.rows_of)], 1)
    return TrainingSet(
        root=benchmark.root,
        instructions=read_instructions(benchmark.instructions) if benchmark.instructions else {},
        query_files=files,
        locations=np.stack([np.frombuffer(of, np.int64) for of in (reader.files, reader.rows)], 1),
        targets=np.frombuffer(reader.targets, np.uint8).astype(np.int64),
        answers=answers,
        known=known,
        dids=tuple(pools.ids.numbers),
        modalities=np.frombuffer(pools.modalities, np.uint8).astype(np.int64),
        pools=tuple(pools.files),
        document_locations=locations,
        representative=representative,
        unused_pools=tuple(
            index.path for number, index in enumerate(pools.files) if number not in reader.used
        ),
        skipped=reader.skipped,
    )


class _QueryReader:
    """Reads queries and notes which documents answer them."""

    def __init__(
        self,
        pools: Pools,
        representative: Int[ndarray, "documents"],
        contents: ndarray,
        first: Int[ndarray, "contents"],
        on_bad_record: OnBadRecord,
    ):
        self.pools = pools
        self.representative = representative
        self.contents, self.first = contents, first
        self.on_bad_record = on_bad_record
        self.skipped = pools.skipped
        self.files, self.rows, self.targets = array("q"), array("q"), array("B")
        self._numbers: dict[str, int] = {}
        """The number of each qid."""
        self._number, self._own = array("q"), array("q")
        """The number of each query's qid, and the document that the query equals; -1 for none."""
        self.used: set[int] = set()
        """Numbers of the pools that hold an answer."""
        self._asked, self._answer = array("q"), array("q")
        """Pairs of the number of a qid and a document that answers it."""

    def read(self, file: int, index: RowIndex[Query]) -> None:
        """Read the queries of a file."""
        for row in range(len(index)):
            try:
                query = index[row]
            except DataError as error:
                reject(error, self.on_bad_record, self.skipped)
                continue
            number = self._numbers.setdefault(query.qid, len(self._numbers))
            self.files.append(file)
            self.rows.append(row)
            self.targets.append(modality_code(TASKS[query.task][1]))
            self._number.append(number)
            self._own.append(self._equal(query))
            for did in query.positives:
                self._note(number, did)

    def judge(self, path: Path) -> None:
        """Read judgments."""
        for qrel in read_qrels(path, on_bad_record=self.on_bad_record, skipped=self.skipped):
            if qrel.qid in self._numbers:
                self._note(self._numbers[qrel.qid], qrel.did)

    def answers(self) -> tuple[Ragged, Ragged]:
        """Return the documents that answer each query, and these with the query's own content."""
        asked, answer = (np.frombuffer(of, np.int64) for of in (self._asked, self._answer))
        number, own = (np.frombuffer(of, np.int64) for of in (self._number, self._own))
        answers = _lists(asked, answer, len(self._numbers)).take(number)
        owner = np.repeat(np.arange(len(number)), answers.lengths)
        equal = np.flatnonzero(own >= 0)
        known = _lists(
            np.concatenate([owner, equal]),
            np.concatenate([answers.values, own[equal]]),
            len(number),
        )
        return answers, known

    def _note(self, number: int, did: str) -> None:
        document = self.pools.ids.numbers.get(did)
        if document is not None:
            self.used.add(self.pools.files_of[document])
            self._asked.append(number)
            self._answer.append(int(self.representative[document]))

    def _equal(self, query: Query) -> int:
        """Return the document that holds what a query holds; -1 for none."""
        key = np.uint64(content_key(query.text, query.image))
        place = int(np.searchsorted(self.contents, key))
        there = place < len(self.contents) and self.contents[place] == key
        return int(self.first[place]) if there else -1


def _lists(owner: Int[ndarray, "pairs"], value: Int[ndarray, "pairs"], count: int) -> Ragged:
    """Return the values of each owner, each once, ascending."""
    pairs = np.unique(np.stack([owner, value], 1), axis=0)
    start = np.searchsorted(pairs[:, 0], np.arange(count + 1))
    return Ragged(start, pairs[:, 1])
