"""Transfers from the host to the devices: a batch, and the teacher's states for it."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from puma_jax.data.pipeline import Batch, HardNegatives
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import batch_sharding, data_shards, replicated
from puma_jax.training.config import LossConfig
from puma_jax.training.objective import TeacherStates


def shard_batch(batch: Batch, config: LossConfig, mesh: jax.sharding.Mesh) -> Batch:
    """Start the transfer of a batch: rows are sharded, columns of pairs are replicated.

    Pairs that are not valid are appended until the pairs divide among devices and chunks of the
    loss.
    """
    missing = _missing(len(batch.query), config, mesh)
    out_of_range = batch.rows.pool_index.size * multihost.process_slice(mesh)[1]

    def padded(column: Any, value: int | float | bool) -> Any:
        widths = ((0, missing), *[(0, 0)] * (column.ndim - 1))
        return np.pad(column, widths, constant_values=value)

    def put(column: Any, value: int) -> Any:
        return multihost.put(padded(column.astype(np.int32), value), replicated(mesh))

    def put_valid(valid: Any) -> Any:
        return multihost.all_valid(padded(valid, False), mesh)

    negatives = batch.negatives
    if negatives is not None:
        slot = np.where(negatives.slot < 0, out_of_range, negatives.slot)
        negatives = HardNegatives(
            slot=put(slot, out_of_range),
            modality=put(negatives.modality, 0),
            document=put(negatives.document, 0),
            valid=put_valid(negatives.valid),
        )
    scores = jax.tree.map(
        lambda of: multihost.put(padded(of.astype(np.float32), math.nan), replicated(mesh)),
        batch.scores,
    )
    by_rows = batch_sharding(mesh, axis=1)
    return Batch(
        rows=jax.tree.map(lambda part: multihost.put_part(part, by_rows), batch.rows),
        query_slot=put(batch.query_slot, out_of_range),
        candidate_slot=put(batch.candidate_slot, out_of_range),
        modality=put(batch.modality, 0),
        query=put(batch.query, 0),
        candidate=put(batch.candidate, 0),
        document=put(batch.document, 0),
        prompt=put(batch.prompt, -1),
        valid=put_valid(batch.valid),
        negatives=negatives,
        scores=scores,
    )


def shard_teacher_states(
    states: TeacherStates, config: LossConfig, mesh: jax.sharding.Mesh
) -> TeacherStates:
    """Start the transfer of the states of a batch, padded with zeros as `shard_batch` pads."""
    missing = _missing(len(states.candidate), config, mesh)
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: multihost.put(np.pad(leaf, ((0, missing), (0, 0))), sharding), states
    )


def _missing(pairs: int, config: LossConfig, mesh: jax.sharding.Mesh) -> int:
    """Return how many pairs a batch lacks to divide among devices and chunks of the loss."""
    shards = data_shards(mesh)
    per_device = -(-pairs // shards)
    if config.chunk_size is not None and config.chunk_size < per_device:
        per_device = -(-per_device // config.chunk_size) * config.chunk_size
    return per_device * shards - pairs
