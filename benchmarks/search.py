"""Compare the speed of exact search with faiss.

    pip install faiss-cpu && python benchmarks/search.py

Both search the same random unit vectors, in turns. The time of the matrix product alone is a lower
bound for any search that computes every score.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import machine
import ml_dtypes
import numpy as np

from puma_jax.search.topk import top_k


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    vectors = rng.standard_normal((count, width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def search_alone(arguments: argparse.Namespace) -> None:
    """Time our search, on the devices that it takes by itself."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16 if arguments.dtype == "bfloat16" else np.float32)
    pool = np.empty((arguments.documents, arguments.width), dtype)
    for start in range(0, len(pool), 2**16):  # few values in float32 at a time
        some = pool[start : start + 2**16]
        some[:] = unit(rng, len(some), arguments.width)
    print(f"{machine.describe()}: {len(pool):,} × {arguments.width} {arguments.dtype}")
    print("\n| queries | seconds | queries/s |\n|--:|--:|--:|")
    results = {}
    for count in arguments.queries:
        queries = unit(rng, count, arguments.width).astype(dtype)
        times = []
        top_k(queries, pool, arguments.k)  # compiles
        with machine.alone():
            for _ in range(arguments.repeats):
                start = time.perf_counter()
                top_k(queries, pool, arguments.k)
                times.append(time.perf_counter() - start)
        results[str(count)] = seconds = statistics.median(times)
        print(f"| {count:,} | {seconds:.3f} | {count / seconds:.1f} |")
    if arguments.json:
        machine.write_json(arguments.json, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--alone", action="store_true", help="without faiss")
    parser.add_argument("--json", type=Path, help="file to write the results to as well")
    arguments = parser.parse_args()
    if arguments.alone:
        search_alone(arguments)
        return
    import faiss

    rng = np.random.default_rng(0)
    pool = unit(rng, arguments.documents, arguments.width)
    index = faiss.IndexFlatIP(arguments.width)
    index.add(pool)
    print(
        f"{machine.describe()}, faiss {faiss.__version__}: {arguments.documents:,} × "
        f"{arguments.width} float32, first {arguments.k}, medians of {arguments.repeats}"
    )
    print("queries    puma_jax       faiss    ratio   product alone   rows equal")
    for count in arguments.queries:
        queries = unit(rng, count, arguments.width)

        def ours(queries: np.ndarray = queries) -> np.ndarray:
            return top_k(queries, pool, arguments.k)[1]

        def theirs(queries: np.ndarray = queries) -> np.ndarray:
            return index.search(queries, arguments.k)[1]

        def product(queries: np.ndarray = queries) -> None:
            for start in range(0, len(pool), 4096):
                queries @ pool[start : start + 4096].T

        times: dict[str, list[float]] = {}
        found = {}
        for _ in range(arguments.repeats):
            for run in (ours, theirs, product):
                start = time.perf_counter()
                found[run.__name__] = run()
                times.setdefault(run.__name__, []).append(time.perf_counter() - start)
        seconds = {name: statistics.median(taken) for name, taken in times.items()}
        equal = np.mean(found["ours"] == found["theirs"])
        print(
            f"{count:7,}  {seconds['ours']:8.3f} s  {seconds['theirs']:8.3f} s  "
            f"{seconds['theirs'] / seconds['ours']:5.2f} ×  {seconds['product']:12.3f} s  "
            f"{equal:11.3%}"
        )
    held = (pool.nbytes * 2) / 1e9
    print(f"peak memory {machine.peak_memory() / 1e9:.2f} GB, {held:.2f} GB of it the two pools")


if __name__ == "__main__":
    main()
