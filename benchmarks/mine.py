"""Measure the memory and the speed of mining on a large set of documents.

    python benchmarks/mine.py --documents 1000000 --width 64

Queries and documents are written in M-BEIR layout, and a function of their numbers stands in for a
model, so that what is measured is reading, storing vectors, searching and choosing. One document in
a hundred repeats the answer of a query under another id: none of these may become a negative.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np

from puma_jax.data import mbeir
from puma_jax.evaluation.mining import MiningConfig, mine
from puma_jax.evaluation.training_set import read_training_set
from puma_jax.evaluation.vector_folder import vector_folder

_REPEATED = 100
"""One document in so many repeats the answer of a query."""


class Vectors:
    """Unit vectors by number; that of a query lies near that of the document of its number."""

    def __init__(self, width: int):
        rng = np.random.default_rng(0)
        # Sums of two rows, chosen by the number: few numbers share both.
        self._tables = [rng.standard_normal((size, width), np.float32) for size in (4093, 4099)]
        self._noise = rng.standard_normal((4091, width), np.float32)

    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        """Return the vectors of items, by the kind and the number in their texts."""
        kinds, numbers = zip(*(item["text"].rstrip(".").split() for item in items), strict=True)
        number = np.array(numbers, np.int64)
        found = sum(table[number % len(table)] for table in self._tables)
        is_query = np.array(kinds) == "Query"
        found[is_query] += self._noise[number[is_query] % len(self._noise)]
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def write(root: Path, queries: int, documents: int) -> None:
    """Write the benchmark."""
    mbeir.write_candidates(
        root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl",
        (
            mbeir.Candidate(f"m:{number}", f"Document {_content(number, queries)}.", None, "text")
            for number in range(documents)
        ),
    )
    mbeir.write_queries(
        root / "query/train/mbeir_made_train.jsonl",
        (
            mbeir.Query(f"m:q{number}", f"Query {number}.", None, "text", (f"m:{number}",), 1)
            for number in range(queries)
        ),
    )


def _content(number: int, queries: int) -> int:
    """Return the number in the text of a document."""
    repeats = number >= queries and number % _REPEATED == 0
    return number // _REPEATED % queries if repeats else number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    before = machine.peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "made")
        write(root, arguments.queries, arguments.documents)
        start = time.perf_counter()
        data = read_training_set(mbeir.discover(root))
        read = time.perf_counter() - start
        at_read = machine.peak_memory()
        with vector_folder(Path(folder, "vectors"), "made") as vectors:
            found = mine(data, Vectors(arguments.width), MiningConfig(), vectors=vectors)
        seconds = time.perf_counter() - start
        contents = [_content(number, arguments.queries) for number in range(arguments.documents)]
        answers = sum(
            contents[int(data.dids[row].partition(":")[2])] == query
            for query, rows in enumerate(found.rows)
            for row in rows[rows >= 0]
        )
    has = np.count_nonzero((found.rows >= 0).any(1))
    print(
        f"{machine.describe()}: {arguments.documents:,} documents and {arguments.queries:,} "
        f"queries of width {arguments.width}\n"
        f"{seconds:.0f} s, {read:.0f} s of them reading: {arguments.documents / seconds:,.0f} "
        "documents/s\n"
        f"peak memory {machine.peak_memory() / 1e9:.2f} GB: {before / 1e9:.2f} GB before, "
        f"{at_read / 1e9:.2f} GB with the set read; all vectors in float32 are "
        f"{4 * arguments.width * arguments.documents / 1e9:.2f} GB\n"
        f"{has:,} queries have negatives, {answers} of these are repeated answers"
    )


if __name__ == "__main__":
    main()
