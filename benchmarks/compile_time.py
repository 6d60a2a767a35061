"""Measure compile time by depth: layers run in one scan, so 28 compile about as fast as 12.

python benchmarks/compile_time.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import qwen2_vl_2b
from machine import describe

from puma_jax.config import ComputeConfig
from puma_jax.model import encoder
from puma_jax.rows import PackedBatch


def abstract_rows(rows: int, length: int, patch_rows: int, patches: int) -> PackedBatch:
    """Return the abstract shapes of a packed batch."""
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    return PackedBatch(
        tokens=ints(rows, length),
        segment_ids=ints(rows, length),
        positions=ints(rows, length, 3),
        image_token_index=ints(rows, length),
        patches=jax.ShapeDtypeStruct((patch_rows, patches, 588), jnp.uint8),
        patch_segment_ids=ints(patch_rows, patches),
        patch_positions=ints(patch_rows, patches, 2),
        pool_index=ints(64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = abstract_rows(4, 512, 4, 1280)
    seconds: dict[int, list[float]] = {12: [], 28: []}
    for _ in range(arguments.repeats):
        for layers, times in seconds.items():
            params = encoder.abstract(qwen2_vl_2b.config(layers), "bfloat16")
            embed = jax.jit(
                lambda p, r: encoder.l2_normalize(encoder.encode(p, r, ComputeConfig()))
            )
            start = time.perf_counter()
            embed.lower(params, rows).compile()
            times.append(time.perf_counter() - start)
    print(f"{describe()}, tower of 32 layers, medians of {arguments.repeats}")
    median = {layers: statistics.median(times) for layers, times in seconds.items()}
    for layers, time_taken in median.items():
        print(f"{layers} layers  {time_taken:.2f} s to trace and compile")
    print(f"28 layers take {median[28] / median[12]:.2f} × the time of 12")


if __name__ == "__main__":
    main()
