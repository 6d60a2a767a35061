"""Measure an index: how fast it is built, how much of the exact answer it finds, how long it takes.

    pip install -e '.[search]' && python benchmarks/index.py

Milvus Lite with HNSW and with FLAT, and the exact index over the folder of vectors, answer the same
queries. Vectors are drawn around 1,000 centers, as those of real documents lie in groups; queries
are documents with noise. The exact index must find the rows of `top_k`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import machine
import numpy as np

from puma_jax.rows import PackedShape
from puma_jax.search.exact import ExactIndex
from puma_jax.search.index import Index
from puma_jax.search.indexing import index_vectors
from puma_jax.search.milvus import MilvusIndex
from puma_jax.search.records import ItemRecord
from puma_jax.search.shards import Vectors, stored_tensors, write_manifest, write_shard
from puma_jax.search.spec import EmbeddingSpec
from puma_jax.search.topk import top_k

CENTERS = 1000
K = 10
FILTERED = 3  # queries with a filter: Milvus Lite takes seconds for each


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_folder(folder: Path, vectors: np.ndarray) -> Vectors:
    """Write a folder of vectors as `puma_jax.embed` does."""
    job = {
        "model": "benchmark",
        "corpus": str(folder / "items"),
        "instruction": None,
        "dtype": "float32",
        "width": vectors.shape[1],
        "items_per_shard": 16384,
    }
    spec = EmbeddingSpec.claim(folder, job, lambda: PackedShape(1, 1, 1, 1, 1))
    names = []
    for shard in range(spec.shards(len(vectors))):
        rows = spec.rows(shard, len(vectors))
        items = [ItemRecord(f"{row}", f"document {row}", fields={"price": row}) for row in rows]
        tensors = stored_tensors(vectors[rows.start : rows.stop], "float32")
        names.append(write_shard(folder, spec, shard, tensors, items))
    write_manifest(folder, spec, names)
    return Vectors(folder)


def latencies(index: Index, queries: np.ndarray, clients: int, **options: str) -> list[float]:
    """Return the seconds that each query took, asked one by one by several clients at once."""
    taken: list[list[float]] = [[] for _ in range(clients)]

    def ask(client: int) -> None:
        for query in queries[client::clients]:
            start = time.perf_counter()
            index.search(query[None], K, **options)
            taken[client].append(time.perf_counter() - start)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [seconds for of_client in taken for seconds in of_client]


def report(name: str, index: Index, queries: np.ndarray, exact: np.ndarray, clients: int) -> None:
    """Print the recall of an index, and how long its answers take."""
    found = [[int(hit.document.id) for hit in hits] for hits in index.search(queries, K)]
    recall = np.mean(
        [len({*rows} & {*right}) / K for rows, right in zip(found, exact.tolist(), strict=True)]
    )
    print(f"{name:18} {recall:9.4f}", end="", flush=True)
    for count in (1, clients):
        start = time.perf_counter()
        seconds = latencies(index, queries, count)
        rate = len(queries) / (time.perf_counter() - start)
        p50, p99 = statistics.median(seconds), float(np.quantile(seconds, 0.99))
        print(f"  {p50 * 1e3:7.1f} / {p99 * 1e3:7.1f} ms {rate:7.0f}/s", end="", flush=True)
    chosen = latencies(index, queries[:FILTERED], 1, filter=f"price < {len(index) // 2}")
    print(f"  {statistics.median(chosen) * 1e3:7.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", default=["FLAT", "HNSW"])
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = arguments.items, arguments.width
    centers = unit(rng.standard_normal((CENTERS, arguments.width), np.float32))
    noise = rng.standard_normal(shape, np.float32) / np.float32(arguments.width**0.5)
    vectors = unit(centers[rng.integers(CENTERS, size=arguments.items)] + noise)
    rows = rng.integers(arguments.items, size=arguments.queries)
    asked = rng.standard_normal((arguments.queries, arguments.width), np.float32)
    queries = unit(vectors[rows] + asked * np.float32(0.5 / arguments.width**0.5))
    _, exact = top_k(queries, vectors, K)
    print(f"{machine.describe()}: {arguments.items:,} × {arguments.width} float32, first {K}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch) / "vectors", vectors)
        for kind in arguments.kinds:
            start = time.perf_counter()
            index_vectors(
                folder, f"{scratch}/{kind}.db", index_type=kind, progress=False
            )  # as in a new file, so that nothing is there
            seconds = time.perf_counter() - start
            print(f"{kind} built in {seconds:.1f} s, {arguments.items / seconds:,.0f} a second")
        print(
            f"{'':18} recall@{K}  p50 / p99 and rate, 1 client   {arguments.clients} clients"
            "             p50, filter for half"
        )
        index: Index = ExactIndex(folder.folder)
        found = [[int(hit.document.id) for hit in hits] for hits in index.search(queries, K)]
        assert found == exact.tolist(), "the exact index must find what top_k does"
        report("exact, no database", index, queries, exact, arguments.clients)
        for kind in arguments.kinds:
            index = MilvusIndex(f"{scratch}/{kind}.db")
            report(f"Milvus Lite {kind}", index, queries, exact, arguments.clients)
            index.close()


if __name__ == "__main__":
    main()
