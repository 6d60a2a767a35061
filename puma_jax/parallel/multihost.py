"""Several processes, one program: how they find each other, and how they agree.

Every process runs the same code and takes part in every computation over the mesh. What must happen
once, such as making a folder, the first one does while the others wait; what goes wrong there goes
wrong everywhere, with one message.
"""

from __future__ import annotations

import functools
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
from puma_jax.parallel.mesh import batch_sharding, groups, replicated
from puma_jax.typing import AnyArray, Array, Bool, ndarray

_MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other; by default there is one."""

    coordinator: str | None = None
    """Address and port of the first process, "10.0.0.1:8476"."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Number of this one, from 0."""
    auto: bool = False
    """Ask the surroundings: the metadata of a TPU slice, SLURM, MPI or Kubernetes."""
    timeout_s: int = 300
    """How long to wait for the others at the start."""

    def __post_init__(self) -> None:
        """Check that all is given, or nothing."""
        given = [value is not None for value in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given) and not self.auto:
            raise ConfigError(
                f"{self}: give coordinator, processes and process, or auto, or none of them"
            )


def initialize(config: DistributedConfig) -> None:
    """Join the other processes, before the first use of a device. Only the first one prints.

    Raises:
        ConfigError: The others cannot be reached, or there is nothing to detect them by.
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
    # On CPUs those who first meet more than 30 seconds apart never do: not once one is at work.
    together(lambda: None)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def once(work: Callable[[], object]) -> None:
    """Let the first process do some work while the others wait.

    Raises:
        PumaError: What the work raised, in all processes.
    """
    if jax.process_count() == 1:
        work()
        return
    together(work if is_first() else lambda: None)


def together(work: Callable[[], object]) -> None:
    """Do some work in every process, and go on when it went well in all of them.

    Raises:
        PumaError: What the work raised in the first process that failed, in all processes.
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


def agreement(mesh: Mesh) -> Callable[[bool], bool]:
    """Return a function that tells all processes alike whether a flag is set in any of them.

    All must ask equally often. With several processes the answer is that to the question before,
    so that no one waits for devices that are at work.
    """
    if jax.process_count() == 1:
        return lambda flag: flag
    any_of = jax.jit(jnp.any, out_shardings=replicated(mesh))
    asked: list[Array] = []

    def ask(flag: bool) -> bool:
        groups_here = groups(mesh) // share_of_rows(mesh)[1]
        asked.append(any_of(put_part(np.full(groups_here, flag), batch_sharding(mesh))))
        return len(asked) > 1 and bool(asked.pop(0))

    return ask


def all_valid(valid: Bool[ndarray, "n"], mesh: Mesh) -> Array:
    """Return, on all devices, where a column is true in every process."""
    if jax.process_count() == 1:
        return jax.device_put(valid, replicated(mesh))
    groups_here = groups(mesh) // share_of_rows(mesh)[1]
    columns = put_part(np.tile(valid, (groups_here, 1)), batch_sharding(mesh))
    return _all_rows(columns, replicated(mesh))


@functools.partial(jax.jit, static_argnames="where")
def _all_rows(columns: Bool[Array, "groups n"], where: NamedSharding) -> Bool[Array, "n"]:
    return jax.lax.with_sharding_constraint(columns.all(0), where)


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """Return which part of a batch's groups the devices of this process read, and of how many.

    Raises:
        ConfigError: They are not one run of groups: rows are dealt out to hosts in order.
    """
    count = groups(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((count,))
    mine = sorted({index[0].indices(count)[0] for index in indices.values() if index})
    size = len(mine)
    if mine != list(range(mine[0], mine[0] + size)) or mine[0] % size or count % size:
        raise ConfigError(
            f"the devices of process {jax.process_index()} read groups {mine} of {count}, expected "
            "one run of them: choose other mesh axes"
        )
    return mine[0] // size, count // size


def put(value: AnyArray, sharding: NamedSharding) -> Array:
    """Start the transfer of a value that every process has whole; each device gets its part."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put_part(value: AnyArray, sharding: NamedSharding) -> Array:
    """Start the transfer of a value of which every process has what its own devices get."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_process_local_data(sharding, value)


def on_host(tree: Any) -> Any:
    """Return a tree whose arrays this process can read, gathered where others hold parts."""
    from jax.experimental import multihost_utils

    def gathered(leaf: Array) -> AnyArray:
        if leaf.is_fully_addressable:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gathered, tree)


def spread(work: Callable[[Sequence[Any]], AnyArray]) -> Callable[[Sequence[Any]], AnyArray]:
    """Return a function from items to rows that shares the items out to the processes.

    Args:
        work: From items to an array with a row for each.
    """
    from jax.experimental import multihost_utils

    def shared(items: Sequence[Any]) -> AnyArray:
        count, number = jax.process_count(), jax.process_index()
        if count == 1:
            return work(items)
        rows = work([items[place] for place in range(number, len(items), count)])
        missing = -(-len(items) // count) - len(rows)
        padded = np.pad(rows, ((0, missing), (0, 0)))
        everyone = multihost_utils.process_allgather(padded)  # [processes, rows, width]
        return everyone.swapaxes(0, 1).reshape(-1, rows.shape[1])[: len(items)]

    return shared
