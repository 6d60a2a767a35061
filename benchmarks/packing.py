"""Measure how full packed rows are and how long planning takes, on lengths like M-BEIR's.

python benchmarks/packing.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import mixture
import numpy as np


def padded(lengths: np.ndarray, chunks: int, *, by_length: bool) -> float:
    """Return the useful fraction if each chunk is padded to its longest item, sorted or not."""
    order = np.argsort(lengths) if by_length else np.arange(len(lengths))
    parts = np.array_split(lengths[order], chunks)
    return lengths.sum() / sum(part.max() * len(part) for part in parts if part.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=600, help="pairs in a global batch")
    parser.add_argument("--grad-cache-chunks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="number of steps to measure")
    parser.add_argument("--queries", type=int, default=2_000_000)
    arguments = parser.parse_args()
    plan = mixture.plan(arguments.queries, arguments.queries // 2, arguments.batch_size)
    print(
        f"batch of {arguments.batch_size} pairs from {arguments.queries:,} queries, "
        f"{arguments.grad_cache_chunks} chunks, {arguments.steps} steps of an epoch of "
        f"{plan.steps_per_epoch}"
    )
    steps = np.linspace(0, plan.steps_per_epoch - 1, arguments.steps).astype(int).tolist()
    sizes = [plan.item_sizes(plan.pairs(step)) for step in steps]
    for what, column in (("tokens", 0), ("patches", 1)):
        for name, chunks, by_length in (
            ("padded to the longest of the batch", 1, False),
            ("padded to the longest of a chunk", arguments.grad_cache_chunks, False),
            ("sorted by length, padded by chunk", arguments.grad_cache_chunks, True),
        ):
            useful = [padded(size[column], chunks, by_length=by_length) for size in sizes]
            print(f"{what:8} {name:38} useful {np.mean(useful):6.1%}")
    for data_shards in (1, 8):
        shape = plan.fitting_shape(arguments.grad_cache_chunks, data_shards)
        tokens, patches = [], []
        for step in steps:
            made = plan.step(step, shape, arguments.grad_cache_chunks)
            tokens.append(
                made.lengths.sum() / (arguments.grad_cache_chunks * shape.rows * shape.length)
            )
            patches.append(
                made.patches.sum()
                / (arguments.grad_cache_chunks * shape.patch_rows * shape.patch_length)
            )
        for what, useful in (("tokens", tokens), ("patches", patches)):
            name = f"packed for {data_shards} device{'s' if data_shards > 1 else ''}"
            print(f"{what:8} {name:38} useful {np.mean(useful):6.1%}  worst step {min(useful):.1%}")
        print(f"         {shape}")
        times = []
        for step in range(100, 200):
            start = time.perf_counter()
            plan.step(step, shape, arguments.grad_cache_chunks)
            times.append(1e3 * (time.perf_counter() - start))
        print(
            f"plan of a step: median {statistics.median(times):.1f} ms, "
            f"mean {statistics.mean(times):.1f} ms, slowest {max(times):.1f} ms"
        )


if __name__ == "__main__":
    main()
