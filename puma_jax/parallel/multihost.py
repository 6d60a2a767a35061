"""Multi-process runs: start, work done by one process, agreement, arrays over all processes.

Every process runs the same program and takes part in every computation over the mesh. Work that
must happen once, such as making a folder, runs on process 0 while the others wait. An error in one
process is raised in all of them, with the same message.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from puma_jax import errors
from puma_jax.errors import ConfigError, PumaError
from puma_jax.parallel.mesh import batch_sharding, data_shards, replicated
from puma_jax.typing import AnyArray, Array, Bool, ndarray

_MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other; the default is a single process."""

    coordinator: str | None = None
    """Address and port of process 0, such as "10.0.0.1:8476"; the default is a single process."""
    processes: int | None = None
    """Number of processes in the run; needed together with `coordinator`."""
    process: int | None = None
    """Index of this process, counted from 0; needed together with `coordinator`."""
    auto: bool = False
    """Whether to detect all of this from the metadata of a TPU slice, Slurm, MPI or Kubernetes."""
    timeout_s: int = 300
    """Seconds to wait for the other processes at the start."""

    def __post_init__(self) -> None:
        """Check that the three settings are given together or not at all."""
        given = [value is not None for value in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given) and not self.auto:
            raise ConfigError(
                f"{self}: give coordinator, processes and process, or auto, or none of them"
            )


def initialize(config: DistributedConfig) -> None:
    """Join the other processes; call it before the first use of a device. Only process 0 prints.

    Raises:
        ConfigError: The other processes cannot be reached, or cannot be detected.
    """
    if config.coordinator is None and not config.auto:
        return
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.processes,
            process_id=config.process,
            initialization_timeout=config.timeout_s,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{config}: the processes did not come together: {reason}") from error
    # On CPUs, the first collective fails if one process reaches it 30 seconds after another: it
    # runs here, before any process has long work to do.
    run_on_all(lambda: None)
    if not is_process_zero():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def is_process_zero() -> bool:
    """Return whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def on_process_zero(work: Callable[[], object]) -> None:
    """Run some work on process 0 while the others wait.

    Raises:
        PumaError: The error that the work raised, in all processes.
    """
    if jax.process_count() == 1:
        work()
        return
    run_on_all(work if is_process_zero() else lambda: None)


def from_process_zero(work: Callable[[], Any]) -> Any:
    """Return, in all processes, what some work returns on process 0, a value that JSON can express.

    Raises:
        PumaError: The error that the work raised, in all processes.
    """
    from jax.experimental import multihost_utils

    found: list[Any] = []
    on_process_zero(lambda: found.append(work()))
    if jax.process_count() == 1:
        return found[0]
    text = json.dumps(found[0]).encode() if found else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    line = np.zeros(size, np.uint8)
    line[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(line)))


def run_on_all(work: Callable[[], object]) -> None:
    """Run some work in every process, and return once it has succeeded in all of them.

    Raises:
        PumaError: The error of the first process that failed, in all processes.
    """
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        work()
        return
    failed: PumaError | None = None
    try:
        work()
    except PumaError as error:
        failed = error
    text = f"{type(failed).__name__} {failed}".encode() if failed else b""
    line = np.zeros(_MESSAGE_BYTES, np.uint8)
    line[: len(text)] = np.frombuffer(text[:_MESSAGE_BYTES], np.uint8)
    for number, found in enumerate(multihost_utils.process_allgather(line)):
        if found.any():
            name, _, message = bytes(found[found > 0]).decode(errors="replace").partition(" ")
            if failed is None or number != jax.process_index():
                failed = getattr(errors, name, PumaError)(f"process {number}: {message}")
            failed.in_all_processes = True
            raise failed


def all_processes(flag: bool) -> bool:
    """Return whether every process passes True; all of them call this together and wait."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).all())


def any_process(mesh: Mesh) -> Callable[[bool], bool]:
    """Return a function that says, in all processes alike, whether any process has set a flag.

    Every process must call it equally often. With several processes each call returns the answer to
    the call before, so that no process waits for busy devices.
    """
    if jax.process_count() == 1:
        return lambda flag: flag
    any_of = jax.jit(jnp.any, out_shardings=replicated(mesh))
    pending: list[Array] = []

    def any_flag(flag: bool) -> bool:
        local_shards = data_shards(mesh) // process_slice(mesh)[1]
        pending.append(any_of(put_part(np.full(local_shards, flag), batch_sharding(mesh))))
        return len(pending) > 1 and bool(pending.pop(0))

    return any_flag


def all_valid(valid: Bool[ndarray, "*column"], mesh: Mesh) -> Array:
    """Return, on all devices, the entries of a column that are true in every process."""
    if jax.process_count() == 1:
        return jax.device_put(valid, replicated(mesh))
    local_shards = data_shards(mesh) // process_slice(mesh)[1]
    copies = np.broadcast_to(valid, (local_shards, *valid.shape))
    columns = put_part(copies, batch_sharding(mesh))
    return _all_of_columns(columns, replicated(mesh))


@functools.partial(jax.jit, static_argnames="sharding")
def _all_of_columns(
    columns: Bool[Array, "data_shards *column"], sharding: NamedSharding
) -> Bool[Array, "*column"]:
    return jax.lax.with_sharding_constraint(columns.all(0), sharding)


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """Return the index of this process's slice of every batch, and the number of slices.

    Raises:
        ConfigError: The devices of this process do not read one contiguous run of data shards.
    """
    count = data_shards(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((count,))
    mine = sorted({index[0].indices(count)[0] for index in indices.values() if index})
    size = len(mine)
    if mine != list(range(mine[0], mine[0] + size)) or mine[0] % size or count % size:
        raise ConfigError(
            f"the devices of process {jax.process_index()} read data shards {mine} of {count}, "
            "expected one contiguous run: choose other mesh axes"
        )
    return mine[0] // size, count // size


def put(value: AnyArray, sharding: NamedSharding) -> Array:
    """Start the transfer of a value that every process holds whole; return the sharded array."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put_part(value: AnyArray, sharding: NamedSharding) -> Array:
    """Start the transfer of a value of which each process holds the part of its own devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_process_local_data(sharding, value)


def gather_to_host(tree: Any) -> Any:
    """Return a tree of arrays that this process can read, gathered from the other processes."""
    from jax.experimental import multihost_utils

    def gathered(leaf: Array) -> AnyArray:
        if leaf.is_fully_addressable:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gathered, tree)


def map_across_processes(
    work: Callable[[Sequence[Any]], AnyArray],
) -> Callable[[Sequence[Any]], AnyArray]:
    """Return a function that divides items among the processes and gathers the results.

    Args:
        work: A function from items to an array with one row per item.
    """
    from jax.experimental import multihost_utils

    def mapped(items: Sequence[Any]) -> AnyArray:
        count, number = jax.process_count(), jax.process_index()
        if count == 1:
            return work(items)
        rows = work([items[place] for place in range(number, len(items), count)])
        missing = -(-len(items) // count) - len(rows)
        padded = np.pad(rows, ((0, missing), (0, 0)))
        everyone = multihost_utils.process_allgather(padded)  # [processes, rows, width]
        return everyone.swapaxes(0, 1).reshape(-1, rows.shape[1])[: len(items)]

    return mapped
