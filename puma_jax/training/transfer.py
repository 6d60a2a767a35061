"""From the host to the devices: a batch, and the states that are its targets."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from puma_jax.data.pipeline import Batch
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import batch_sharding, groups, replicated
from puma_jax.training.config import LossConfig
from puma_jax.training.step import Targets


def put(batch: Batch, config: LossConfig, mesh: jax.sharding.Mesh) -> Batch:
    """Start the transfer of a batch: rows over the devices, the pairs' numbers to all of them.

    Pairs are filled up with ones that are not valid, until they divide among devices and rows of
    the loss.
    """
    missing = _missing(len(batch.query), config, mesh)
    behind = batch.rows.ret.size * multihost.share_of_rows(mesh)[1]

    def filled(column: Any, value: int | bool) -> Any:
        return np.pad(column, (0, missing), constant_values=value)

    columns = {
        "query_slot": filled(batch.query_slot.astype(np.int32), behind),
        "candidate_slot": filled(batch.candidate_slot.astype(np.int32), behind),
        "modality": filled(batch.modality, 0),
        "query": filled(batch.query.astype(np.int32), 0),
        "candidate": filled(batch.candidate.astype(np.int32), 0),
        "prompt": filled(batch.prompt.astype(np.int32), -1),
    }
    by_rows = batch_sharding(mesh, axis=1)
    return dataclasses.replace(
        batch,
        rows=jax.tree.map(lambda part: multihost.put_part(part, by_rows), batch.rows),
        valid=multihost.all_valid(filled(batch.valid, False), mesh),
        **{name: multihost.put(column, replicated(mesh)) for name, column in columns.items()},
    )


def put_targets(targets: Targets, config: LossConfig, mesh: jax.sharding.Mesh) -> Targets:
    """Start the transfer of states for a batch, filled up with zeros where `put` fills it up."""
    missing = _missing(len(targets.query), config, mesh)
    over_devices = batch_sharding(mesh)
    return jax.tree.map(
        lambda states: multihost.put(np.pad(states, ((0, missing), (0, 0))), over_devices), targets
    )


def _missing(pairs: int, config: LossConfig, mesh: jax.sharding.Mesh) -> int:
    """Return how many pairs a batch lacks to divide among devices and rows of the loss."""
    parts = groups(mesh)
    of_device = -(-pairs // parts)
    if config.rows is not None and config.rows < of_device:
        of_device = -(-of_device // config.rows) * config.rows
    return of_device * parts - pairs
