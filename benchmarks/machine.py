"""Measure this machine: its matrix-product peak and the memory of this process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

LOCK = "PUMA_JAX_BENCHMARK_LOCK"
"""Name of an environment variable: the file that processes lock which measure the same machine."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until none of the processes that share a lock is in here; without a lock, do nothing.

    `gpu.py` starts all benchmarks at once. They compile side by side, and measure one by one.
    """
    if LOCK not in os.environ:
        yield
        return
    with open(os.environ[LOCK], "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def square_product(
    dtype: str = "float32", size: int | None = None
) -> tuple[Callable[[], object], int]:
    """Return a large matrix product, whose speed is the machine's peak, and its FLOPs."""
    size = size or (3072 if jax.default_backend() == "cpu" else 8192)
    # Random, because multiplying ones takes less power, and a GPU does it faster.
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    return lambda: product(a).block_until_ready(), 2 * size**3


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe() -> str:
    """Return a line that names the device, the cores and the jax version."""
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"


def write_json(path: Path, results: object) -> None:
    """Write results to a file, with the machine that they are from."""
    path.write_text(json.dumps({"machine": describe(), "results": results}, indent=1) + "\n")
