"""Batches of a tiny model, packed into any number of chunks and data shards."""

from __future__ import annotations

import numpy as np

from puma_jax.data.packing import fill, place
from puma_jax.data.pipeline import Batch
from puma_jax.data.shapes import batch_shape
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


def batch_of(pair: Pair, pairs: int, chunks: int, data_shards: int = 1) -> Batch:
    """The same pairs, however they are packed."""
    queries, candidates, modality = items_of(pair, pairs)
    items = queries + candidates
    lengths = np.array([len(item.tokens) for item in items])
    patches = np.array([len(item.patches) for item in items])
    largest = int(lengths.max()), int(patches.max())
    shape = batch_shape([(lengths, patches)], chunks, data_shards, largest)
    packing = place(lengths, patches, shape, chunks)
    slots = packing.chunk * shape.slots + packing.slot
    return Batch(
        rows=fill(items, packing, shape, pair.config.vision),
        query_slot=slots[:pairs],
        candidate_slot=slots[pairs:],
        modality=modality,
        query=np.arange(pairs),
        candidate=np.arange(pairs),
        prompt=np.full(pairs, -1),
        valid=np.arange(pairs) != pairs - 2,
    )
