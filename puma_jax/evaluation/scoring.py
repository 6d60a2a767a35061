"""A teacher's scores of the documents that training queries name: positives and hard negatives.

Equal documents are scored once for each query. With an embedder a score is the cosine of two
vectors, with a reranker the logit of a pair.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puma_jax.data.items import Item
from puma_jax.data.lines import BadRecords, OnBadRecord, reject, resolve_inside
from puma_jax.data.preparing import prepare, run
from puma_jax.data.table import Ragged
from puma_jax.embedder import Embedder, RawItem
from puma_jax.errors import DataError, ItemError
from puma_jax.evaluation.encoding import Batches, ItemEncoder
from puma_jax.evaluation.mining import document_sources, query_sources
from puma_jax.evaluation.training_set import TrainingSet
from puma_jax.evaluation.vector_folder import VectorFolder
from puma_jax.parallel import multihost
from puma_jax.progress import Progress
from puma_jax.reranker import Reranker
from puma_jax.typing import Float, Int, ndarray

_SCORES_AT_ONCE = 1 << 16
# A kill loses at most the pairs of one part.
_PAIRS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Scored:
    """Scores of the documents that queries name."""

    named: Ragged
    """Rows of the documents of each query."""
    scores: Float[ndarray, "pairs"]
    """Score of each; NaN if it, or its query, cannot be read."""
    unknown: int
    """Ids that no document has."""
    skipped: BadRecords
    """Counts the records that could not be read, with the first messages."""

    def of_query(self, query: int) -> tuple[Int[ndarray, "n"], Float[ndarray, "n"]]:
        """Return the documents of a query that have a score, and the scores."""
        own = slice(self.named.start[query], self.named.start[query + 1])
        there = np.isfinite(self.scores[own])
        return self.named.values[own][there], self.scores[own][there]


def score(
    data: TrainingSet,
    teacher: Embedder | Reranker,
    *,
    tokens_per_chunk: int | None = None,
    on_bad_record: OnBadRecord = "error",
    vectors: VectorFolder | None = None,
    progress: bool = True,
) -> Scored:
    """Return a teacher's scores of the positives and the hard negatives of all queries.

    Args:
        data: The queries and the documents.
        teacher: The model that scores.
        tokens_per_chunk: See `Embedder.encode`.
        on_bad_record: "error" stops at an item that cannot be read, "skip" leaves it out and counts
            it.
        vectors: Folder for finished work, from `vector_folder`, from which a rerun resumes; None
            keeps it in memory.
        progress: Whether to show a progress bar.

    Raises:
        DataError: No query names a document of the pools, or an item cannot be read and
            `on_bad_record` is "error".
        EvaluationError: There is not one finite vector for each item.
    """
    named, unknown = _named(data)
    skipped = BadRecords()
    owner = np.repeat(np.arange(len(named)), named.lengths)
    pairs = np.stack([owner, data.representative[named.values]], 1)
    pairs, place = np.unique(pairs, axis=0, return_inverse=True)
    if not len(pairs):
        raise DataError(f"{data.root}: no training query names a document of the pools")
    if isinstance(teacher, Reranker):
        with Progress(total=len(pairs), desc="scoring", unit="pair", disable=not progress) as bar:
            by_pairs = _Pairs(data, teacher, tokens_per_chunk, on_bad_record, vectors, skipped, bar)
            scores = by_pairs.scores(pairs)
    else:
        asked, documents = (np.unique(of) for of in pairs.T)
        total = len(asked) + len(documents)
        with Progress(total=total, desc="embedding", unit="item", disable=not progress) as bar:
            encode = ItemEncoder(teacher, tokens_per_chunk)
            batches = Batches(encode, data.root, bar, vectors, on_bad_record, skipped)
            of_queries, readable = batches.embed(query_sources(data), asked)
            of_documents, there = batches.embed(document_sources(data), documents)
        scores = np.full(len(pairs), np.nan, np.float32)
        known = np.flatnonzero(readable[pairs[:, 0]] & there[pairs[:, 1]])
        for start in range(0, len(known), _SCORES_AT_ONCE):
            some = known[start : start + _SCORES_AT_ONCE]
            query, document = pairs[some].T
            scores[some] = np.einsum("nd,nd->n", of_queries[query], of_documents[document])
    return Scored(named, scores[place.reshape(-1)], unknown, skipped)


def _named(data: TrainingSet) -> tuple[Ragged, int]:
    """Return the documents that each query names, and how many ids no document has."""
    rows = {did: row for row, did in enumerate(data.dids)}
    start, values, unknown = array("q", [0]), array("q"), 0
    for number in range(len(data)):
        query = data.query(number)
        for did in dict.fromkeys((*query.positives, *query.negatives)):
            if did in rows:
                values.append(rows[did])
            else:
                unknown += 1
        start.append(len(values))
    return Ragged(np.array(start, np.int64), np.array(values, np.int64)), unknown


@dataclass(frozen=True)
class _Pairs:
    """Scores pairs of a query and a document with a reranker."""

    data: TrainingSet
    reranker: Reranker
    tokens_per_chunk: int | None
    on_bad_record: OnBadRecord
    folder: VectorFolder | None
    skipped: BadRecords
    bar: Progress

    def scores(self, pairs: Int[ndarray, "n 2"]) -> Float[ndarray, "n"]:
        """Return the logit of each pair; NaN where one of the two cannot be read."""
        found = [np.zeros(0, np.float32)]
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            # Shuffled, so that each part has the same mixture of lengths and images.
            order = np.random.default_rng(0).permutation(len(pairs[start : start + _PAIRS_AT_ONCE]))
            scores = np.empty(len(order), np.float32)
            scores[order] = self._part(pairs[start + order].tolist())
            found.append(scores)
            self.bar.update(len(order))
        return np.concatenate(found)

    def _part(self, pairs: list[list[int]]) -> Float[ndarray, "n"]:
        items = [self._items(query, document) for query, document in pairs]
        key = VectorFolder.key([item for both in items for item in both]) if self.folder else ""
        scores = self.folder.read(key, len(items)) if self.folder else None
        if scores is None:
            scores = np.asarray(multihost.map_across_processes(self._score)(items))
            if self.folder:
                scores = self.folder.write(key, scores)
        for place in np.flatnonzero(np.isnan(scores[:, 0])).tolist():
            self._reject(pairs[place], run(self._preparing(items[place])))
        return scores[:, 0]

    def _items(self, query: int, document: int) -> tuple[RawItem, RawItem]:
        return self.data.query_item(query), self.data.document(document)

    def _score(self, items: Sequence[tuple[RawItem, RawItem]]) -> Float[ndarray, "n 1"]:
        scores = np.full((len(items), 1), np.nan, np.float32)
        read = list(prepare(self._preparing, items))
        good = [place for place, item in enumerate(read) if isinstance(item, Item)]
        logits = self.reranker.logits(
            (item for item in read if isinstance(item, Item)),
            tokens_per_chunk=self.tokens_per_chunk,
            progress=False,
        )
        scores[good, 0] = logits
        return scores

    async def _preparing(self, items: tuple[RawItem, RawItem]) -> Item | Exception:
        """Return the item of a pair, or why it cannot be read."""
        try:
            for item in items:
                if "image" in item:
                    # An image that lies elsewhere, by a link, is not read.
                    path = item["image"].relative_to(self.data.root)
                    resolve_inside(self.data.root, path.as_posix())
            return await self.reranker.preparing(items)
        except (DataError, ItemError) as error:
            return error

    def _reject(self, pair: list[int], found: Item | Exception) -> None:
        """Raise the error of a pair with the names of both, or count it."""
        query, document = pair
        error = DataError(f'document "{self.data.dids[document]}": {found}')
        reject(self.data.query_error(query, error), self.on_bad_record, self.skipped)
