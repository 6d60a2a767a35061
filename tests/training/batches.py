"""Batches of a tiny model, packed into any number of chunks and data shards."""

from __future__ import annotations

import itertools

import numpy as np

from puma_jax.axes import TILE
from puma_jax.data.packing import fill, place_in
from puma_jax.data.pipeline import Batch, HardNegatives
from puma_jax.data.table import TeacherScores
from puma_jax.rows import PackedShape
from tests.reference import Pair, random_image


def items_of(pair: Pair, pairs: int):
    """Queries, candidates of all three modalities, and the codes of these."""
    queries, candidates, modality = [], [], []
    for i in range(pairs):
        queries.append(pair.item(f"find number {i * 37 % 101}" + " and more" * (i % 3)))
        image = random_image(56, 56 + 28 * (i % 2), i)
        kind = i % 3
        text = f"it is {i}" if kind else ""
        candidates.append(pair.item(text, *([image] if kind != 1 else [])))
        modality.append(kind)
    return queries, candidates, np.array(modality, np.int32)


def negatives_of(pair: Pair, candidates, modality, count: int):
    """Hard negatives of each pair: their items, and a row of modalities and documents for each.

    The first one of a query holds what its own candidate holds, or the next query's, in turn. Some
    are not there: their document is -1.
    """
    pairs = len(candidates)
    items, kinds = [], np.zeros((pairs, count), np.int32)
    documents = np.full((pairs, count), -1, np.int32)
    for i, j in np.ndindex(pairs, count):
        if (i * count + j) % 5 == 4:
            continue
        copied = (i + i % 2) % pairs
        text = pair.item(f"not number {i * 31 % 101}" + " and less" * j)
        items.append(text if j else candidates[copied])
        kinds[i, j] = 1 if j else modality[copied]
        documents[i, j] = pairs + i * count + j if j else copied
    return items, kinds, documents


def batch_of(
    pair: Pair, pairs: int, chunks: int, data_shards: int = 1, negatives: int = 0
) -> Batch:
    """The same pairs, each with its hard negatives, however they are packed."""
    queries, candidates, modality = items_of(pair, pairs)
    hard, kinds, documents = negatives_of(pair, candidates, modality, negatives)
    items = queries + candidates + hard
    lengths = np.array([len(item.tokens) for item in items])
    patches = np.array([len(item.patches) for item in items])
    packing, shape = packed_in_short_rows(lengths, patches, chunks, data_shards)
    slots = packing.chunk * shape.slots + packing.slot
    there = documents >= 0
    slot = np.full(there.shape, -1)
    slot[there] = slots[2 * pairs :]
    return Batch(
        rows=fill(items, packing, shape, pair.config.vision),
        query_slot=slots[:pairs],
        candidate_slot=slots[pairs : 2 * pairs],
        modality=modality,
        query=np.arange(pairs),
        candidate=np.arange(pairs),
        document=np.arange(pairs, dtype=np.int32),
        prompt=np.full(pairs, -1),
        valid=np.arange(pairs) != pairs - 2,
        negatives=HardNegatives(slot, kinds, documents, there) if negatives else None,
        scores=scores_of(there) if negatives else None,
    )


def packed_in_short_rows(lengths, patches, chunks: int, data_shards: int):
    """The places of items in rows as short as the longest one, and the shape.

    Attention over long rows would take most of the time of a tiny model.
    """
    length, patch_length = (-(-int(sizes.max()) // TILE) * TILE for sizes in (lengths, patches))
    slots = data_shards * (2 * len(lengths) // (chunks * data_shards) + 1)
    for rows in itertools.count(data_shards, data_shards):
        shape = PackedShape(rows, length, rows, patch_length, slots, data_shards)
        packing = place_in(lengths, patches, shape, chunks)
        if packing is not None:
            return packing, shape
    raise AssertionError("unreachable")


def scores_of(there) -> TeacherScores:
    """A teacher's scores; some documents that are there have none."""
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(size=len(there)), rng.normal(size=there.shape)
    positive[3], negative[5] = np.nan, np.nan
    negative = np.where(there, negative, np.nan)
    return TeacherScores(positive.astype(np.float32), negative.astype(np.float32))
