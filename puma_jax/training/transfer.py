"""Transfers from the host to the devices: a batch, and the teacher's states for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from puma_jax.data.pipeline import Batch
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import batch_sharding, data_shards, replicated
from puma_jax.training.config import LossConfig
from puma_jax.training.step import PairStates


def shard_batch(batch: Batch, config: LossConfig, mesh: jax.sharding.Mesh) -> Batch:
    """Start the transfer of a batch: rows are sharded, columns of pairs are replicated.

    Pairs that are not valid are appended until the pairs divide among devices and chunks of the
    loss.
    """
    missing = _missing(len(batch.query), config, mesh)
    out_of_range = batch.rows.pool_index.size * multihost.process_slice(mesh)[1]

    def padded(column: Any, value: int | bool) -> Any:
        return np.pad(column, (0, missing), constant_values=value)

    columns = {
        "query_slot": padded(batch.query_slot.astype(np.int32), out_of_range),
        "candidate_slot": padded(batch.candidate_slot.astype(np.int32), out_of_range),
        "modality": padded(batch.modality, 0),
        "query": padded(batch.query.astype(np.int32), 0),
        "candidate": padded(batch.candidate.astype(np.int32), 0),
        "prompt": padded(batch.prompt.astype(np.int32), -1),
    }
    by_rows = batch_sharding(mesh, axis=1)
    return dataclasses.replace(
        batch,
        rows=jax.tree.map(lambda part: multihost.put_part(part, by_rows), batch.rows),
        valid=multihost.all_valid(padded(batch.valid, False), mesh),
        **{name: multihost.put(column, replicated(mesh)) for name, column in columns.items()},
    )


def shard_pair_states(
    states: PairStates, config: LossConfig, mesh: jax.sharding.Mesh
) -> PairStates:
    """Start the transfer of the states of a batch, padded with zeros as `shard_batch` pads."""
    missing = _missing(len(states.query), config, mesh)
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
