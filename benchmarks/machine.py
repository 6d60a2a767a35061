"""What this machine can do: its matrix-product peak, its memory, a median of repeated timings."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of `run`, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_peak(dtype: str = "float32", size: int = 2048) -> float:
    """Return the FLOP/s of a large square product, the best of what jax reaches here."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / median_seconds(lambda: product(a).block_until_ready())


def peak_memory() -> int:
    """Return the most bytes this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe() -> str:
    """Return a line that says what the numbers were measured on."""
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
