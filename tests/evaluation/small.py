"""Benchmarks of a few lines, written as they are wanted."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from puma_jax.data import mbeir
from puma_jax.data.mbeir import TASKS, Candidate, Qrel, Query


def encode(items):
    """Counts of words, hashed: equal texts have equal vectors, others hardly ever."""
    vectors = np.zeros((len(items), 64), np.float32)
    for vector, item in zip(vectors, items, strict=True):
        for word in item.get("text", str(item.get("image"))).lower().rstrip(".").split():
            vector[zlib.crc32(word.encode()) % 64] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def document(did: str, text: str | None = None, image: str | None = None) -> Candidate:
    kinds = [kind for kind, value in (("image", image), ("text", text)) if value]
    return Candidate(did, text, image, ",".join(kinds))


def write_set(
    root: Path,
    name: str,
    task: int,
    queries: dict[str, tuple[str | None, list[str]]],
    pool: Iterable[Candidate],
    *,
    images: dict[str, str] | None = None,
) -> Path:
    """Write a set of the test split.

    Args:
        root: Folder of the benchmark.
        name: Name of the set.
        task: Its task.
        queries: Text and relevant documents of each query, by its id.
        pool: Local pool.
        images: Images of queries, by their ids.
    """
    stem, images = f"mbeir_{name}_task{task}", images or {}
    mbeir.write_queries(
        root / f"query/test/{stem}_test.jsonl",
        [
            Query(qid, text, images.get(qid), TASKS[task][0], tuple(dids), task)
            for qid, (text, dids) in queries.items()
        ],
    )
    mbeir.write_candidates(root / f"cand_pool/local/{stem}_cand_pool.jsonl", pool)
    mbeir.write_qrels(
        root / f"qrels/test/{stem}_test_qrels.txt",
        [Qrel(qid, did, 1, task) for qid, (_, dids) in queries.items() for did in dids],
    )
    return root
