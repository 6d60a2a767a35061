"""Hard negatives: documents that a model ranks high for a training query and that do not answer it.

All documents are ranked for each query. Those with the content of a known answer, or of the query
itself, are left out, and ranks count the others. Of a range of ranks those are taken that score
clearly less than the query's answers: a document that scores as high is likely to answer it, too
(NV-Retriever, arXiv 2407.15831).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from puma_jax.config import require
from puma_jax.data.lines import BadRecords, OnBadRecord
from puma_jax.data.table import Ragged
from puma_jax.embedder import Embedder
from puma_jax.evaluation.encoding import Batches, Encode, ItemEncoder, Sources
from puma_jax.evaluation.training_set import TrainingSet
from puma_jax.evaluation.vector_folder import GatheredRows, VectorFolder
from puma_jax.progress import Progress
from puma_jax.schema import Fraction, Range, check
from puma_jax.search.topk import top_k
from puma_jax.typing import Bool, Float, Int, ndarray

Rank = Annotated[int, Range(1, 10_000)]

_TILE = 4096
_QUERIES_AT_ONCE = 8192


@dataclass(frozen=True)
class MiningConfig:
    """Which documents become the hard negatives of a query."""

    ranks: tuple[Rank, Rank] = (10, 100)
    """First and last rank, from 1, among the documents that are not known to answer the query."""
    negatives: Annotated[int, Range(1, 1024)] = 8
    """Most negatives of a query; those of the best ranks are taken."""
    margin: Fraction = 0.95
    """A negative scores at most this share of the lowest score of the query's answers; 0.95 is the
    value of NV-Retriever."""
    same_modality: Fraction | None = None
    """Share of the negatives that have the modality the query asks for; the rest have others. A
    query that has fewer of one kind gets fewer. By default, modalities do not matter."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A setting is out of range.
        """
        check(self, "mining")
        require(
            self.ranks[0] <= self.ranks[1],
            f"mining.ranks {self.ranks} must be a first and a last rank",
        )


@dataclass(frozen=True)
class Mined:
    """The hard negatives of training queries, and what was left out."""

    rows: Int[ndarray, "queries negatives"]
    """Rows of documents, best rank first; -1 where a query has fewer."""
    too_close: int
    """Documents in the range of ranks that score too close to an answer."""
    unanswered: int
    """Queries without negatives, because none of their answers is among the documents."""
    skipped: BadRecords
    """Counts the records that could not be read, with the first messages."""


def mine(
    data: TrainingSet,
    model: Embedder | Encode,
    config: MiningConfig,
    *,
    on_bad_record: OnBadRecord = "error",
    vectors: VectorFolder | None = None,
    progress: bool = True,
) -> Mined:
    """Return hard negatives of all queries.

    They depend on the data and the model alone. Equal scores are ordered by the place of documents
    in the pools.

    Args:
        data: The queries and the documents.
        model: An embedder, or any function from items to unit vectors.
        config: Which documents are taken.
        on_bad_record: "error" stops at an item that cannot be read, "skip" leaves it out and counts
            it.
        vectors: Folder for the vectors, from `vector_folder`, if memory is too small for them or a
            rerun is to resume; None keeps them in memory.
        progress: Whether to show progress bars.

    Raises:
        DataError: An item cannot be read, and `on_bad_record` is "error".
        EvaluationError: There is not one finite vector for each item.
    """
    order, skipped = data.unique_documents(), BadRecords()
    total = len(order) + len(data)
    with Progress(total=total, desc="embedding", unit="item", disable=not progress) as bar:
        encode = ItemEncoder(model) if isinstance(model, Embedder) else model
        batches = Batches(encode, data.root, bar, vectors, on_bad_record, skipped)
        queries, asked = batches.embed(query_sources(data), np.arange(len(data)))
        documents, there = batches.embed(document_sources(data), order)
    answers = data.answers.where(there[data.answers.values])
    answered = answers.lengths > 0
    pool = order[there[order]]
    chosen = np.flatnonzero(asked & answered)
    rows = np.full((len(data), config.negatives), -1, np.int64)
    search = _Search(data, answers, queries, documents, pool, config)
    too_close = 0
    with Progress(
        total=len(chosen), desc="searching", unit="query", disable=not progress
    ) as searching:
        for start in range(0, len(chosen), _QUERIES_AT_ONCE):
            some = chosen[start : start + _QUERIES_AT_ONCE]
            rows[some], left_out = search(some)
            too_close += left_out
            searching.update(len(some))
    return Mined(rows, too_close, int((asked & ~answered).sum()), skipped)


def query_sources(data: TrainingSet) -> Sources:
    """Return the training queries as items to embed."""
    return Sources("query", len(data), data.query_item, data.qid, data.query_error)


def document_sources(data: TrainingSet) -> Sources:
    """Return the documents as items to embed."""
    dids = data.dids
    return Sources("document", len(dids), data.document, dids.__getitem__, data.document_error)


@dataclass(frozen=True)
class _Search:
    """Finds the hard negatives of some queries at a time."""

    data: TrainingSet
    answers: Ragged
    """Readable documents that answer each query."""
    queries: ndarray | GatheredRows
    documents: ndarray | GatheredRows
    pool: Int[ndarray, "documents_of_pool"]
    """Readable documents, each content once."""
    config: MiningConfig

    def __call__(self, some: Int[ndarray, "n"]) -> tuple[Int[ndarray, "n negatives"], int]:
        """Return the negatives of queries, and how many documents score too close to an answer."""
        data, pool = self.data, self.pool
        vectors, known = self.queries[some], data.known.take(some)
        most = int(data.known.lengths.max())
        depth = min(self.config.ranks[1] + most, len(pool))
        scores, found = top_k(vectors, self._tiles(), depth)
        rows = np.where(found < 0, -1, pool[found])
        same = data.modalities[rows] == data.targets[some][:, None]
        is_known = _isin(rows, known)
        return choose(scores, rows, is_known, same, self._limits(some, vectors), self.config)

    def _tiles(self) -> Iterator[Float[ndarray, "_ width"]]:
        for start in range(0, len(self.pool), _TILE):
            yield self.documents[self.pool[start : start + _TILE]]

    def _limits(
        self, some: Int[ndarray, "n"], vectors: Float[ndarray, "n width"]
    ) -> Float[ndarray, "n"]:
        """Return the highest score that a negative of each query may have."""
        answers = self.answers.take(some)
        owner = np.repeat(np.arange(len(some)), answers.lengths)
        lowest = np.full(len(some), np.inf, np.float32)
        for start in range(0, len(owner), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            of_answers = self.documents[answers.values[part]]
            scores = np.einsum("nd,nd->n", vectors[owner[part]], of_answers)
            np.minimum.at(lowest, owner[part], scores)
        # A share of a score below 0 would lie above it.
        return lowest - np.float32(1 - self.config.margin) * np.abs(lowest)


def choose(
    scores: Float[ndarray, "n depth"],
    rows: Int[ndarray, "n depth"],
    known: Bool[ndarray, "n depth"],
    same: Bool[ndarray, "n depth"],
    limits: Float[ndarray, "n"],
    config: MiningConfig,
) -> tuple[Int[ndarray, "n negatives"], int]:
    """Return the negatives of ranked documents, and how many score too close to an answer.

    Args:
        scores: Scores of the documents that each query found, best first.
        rows: Their rows; -1 beyond the end of a small pool.
        known: Which of them are known to answer the query, or are the query itself.
        same: Which of them have the modality that the query asks for.
        limits: The highest score that a negative of each query may have.
        config: Which documents are taken.
    """
    counted = (rows >= 0) & ~known
    rank = np.cumsum(counted, axis=1)
    inside = counted & (rank >= config.ranks[0]) & (rank <= config.ranks[1])
    taken = inside & (scores <= limits[:, None])
    too_close = int((inside & ~taken).sum())
    count = config.negatives
    if config.same_modality is None:
        taken &= np.cumsum(taken, axis=1) <= count
    else:
        of_same = round(config.same_modality * count)
        kinds = (taken & same, of_same), (taken & ~same, count - of_same)
        taken = np.logical_or(*(kind & (np.cumsum(kind, axis=1) <= most) for kind, most in kinds))
    negatives = np.full((len(rows), count), -1, np.int64)
    query, place = np.nonzero(taken)
    negatives[query, np.cumsum(taken, axis=1)[query, place] - 1] = rows[query, place]
    return negatives, too_close


def _isin(rows: Int[ndarray, "n depth"], lists: Ragged) -> Bool[ndarray, "n depth"]:
    """Return which of the rows of each query are in its list."""
    size = max(rows.max(initial=0), lists.values.max(initial=0)) + 2
    owner = np.repeat(np.arange(len(lists)), lists.lengths)
    keys = np.arange(len(rows))[:, None] * size + rows + 1
    return np.isin(keys, owner * size + lists.values + 1)
