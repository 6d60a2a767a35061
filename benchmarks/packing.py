"""How full rows are, and how long planning takes, on a mixture of lengths like M-BEIR's.

python benchmarks/packing.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import mixture
import numpy as np


def padded(lengths: np.ndarray, chunks: int, *, by_length: bool) -> float:
    """Useful fraction when every chunk is padded to its longest item, sorted by length or not."""
    order = np.argsort(lengths) if by_length else np.arange(len(lengths))
    parts = np.array_split(lengths[order], chunks)
    return lengths.sum() / sum(part.max() * len(part) for part in parts if part.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=600, help="pairs in a global batch")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="steps looked at")
    parser.add_argument("--queries", type=int, default=2_000_000)
    arguments = parser.parse_args()
    plan = mixture.plan(arguments.queries, arguments.queries // 2, arguments.batch)
    print(
        f"batch of {arguments.batch} pairs from {arguments.queries:,} queries, "
        f"{arguments.chunks} chunks, {arguments.steps} steps of an epoch of {plan.steps_per_epoch}"
    )
    steps = np.linspace(0, plan.steps_per_epoch - 1, arguments.steps).astype(int).tolist()
    sizes = [plan.item_sizes(plan.pairs(step)) for step in steps]
    for what, column in (("tokens", 0), ("patches", 1)):
        for name, chunks, by_length in (
            ("padded to the longest of the batch", 1, False),
            ("padded to the longest of a chunk", arguments.chunks, False),
            ("sorted by length, padded by chunk", arguments.chunks, True),
        ):
            useful = [padded(size[column], chunks, by_length=by_length) for size in sizes]
            print(f"{what:8} {name:38} useful {np.mean(useful):6.1%}")
    for groups in (1, 8):
        shape = plan.fitting_shape(arguments.chunks, groups)
        tokens, patches = [], []
        for step in steps:
            made = plan.step(step, shape, arguments.chunks)
            tokens.append(made.lengths.sum() / (arguments.chunks * shape.rows * shape.length))
            patches.append(
                made.patches.sum() / (arguments.chunks * shape.patch_rows * shape.patch_length)
            )
        for what, useful in (("tokens", tokens), ("patches", patches)):
            name = f"packed for {groups} device{'s' if groups > 1 else ''}"
            print(f"{what:8} {name:38} useful {np.mean(useful):6.1%}  worst step {min(useful):.1%}")
        print(f"         {shape}")
        times = []
        for step in range(100, 200):
            start = time.perf_counter()
            plan.step(step, shape, arguments.chunks)
            times.append(1e3 * (time.perf_counter() - start))
        print(
            f"plan of a step: median {statistics.median(times):.1f} ms, "
            f"mean {statistics.mean(times):.1f} ms, slowest {max(times):.1f} ms"
        )


if __name__ == "__main__":
    main()
