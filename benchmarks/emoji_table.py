"""Print the results of a demo run as a table of emoji, without the art.

    python benchmarks/emoji_table.py --run runs/demo-full/results/pruned --data.root runs/openmoji

The drawings are CC BY-SA and not part of the repository; the table shows their emoji, which are
characters. Queries are evenly spaced among those of each task.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from puma_jax.data import mbeir
from puma_jax.evaluation.report import POOLS, markdown

FOUND = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="results folder of a stage")
    parser.add_argument(
        "--data.root", dest="root", type=Path, required=True, help="folder of the demo benchmark"
    )
    parser.add_argument("--queries", type=int, default=2, help="queries of each task")
    parser.add_argument("--pool", choices=POOLS, default="local", help="pool that was searched")
    given = parser.parse_args()

    benchmark = mbeir.discover(given.root)
    pool = {row.did: row for row in mbeir.read_candidates(benchmark.global_pools["test"])}
    rows = []
    for query_set in benchmark.sets:
        if query_set.split != "test":
            continue
        queries = list(mbeir.read_queries(query_set.queries_path))
        found = ranked(
            given.run / f"mbeir_{query_set.name}_task{query_set.task}_test_{given.pool}_run.txt"
        )
        step = len(queries) // given.queries
        for query in queries[step // 2 :: step][: given.queries]:
            answers = set(query.positives)
            cells = [
                f"**{shown(pool[did])}**" if did in answers else shown(pool[did])
                for did in found[query.qid][:FOUND]
            ]
            rows.append([str(query_set.task), shown(query), *cells])
    print(markdown(["task", "query", *map(str, range(1, FOUND + 1))], rows))


def ranked(path: Path) -> dict[str, list[str]]:
    """Return the documents of each query in a TREC run file, best first."""
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        qid, _, did, *_ = line.split()
        found.setdefault(qid, []).append(did)
    return found


def shown(item: mbeir.Query | mbeir.Candidate) -> str:
    """Return an item as text: its emoji, with "✎" before it for line drawings, and its words."""
    parts = []
    if item.image:
        points = Path(item.image).stem.split("-")
        pencil = "✎" if Path(item.image).parent.name != "color" else ""
        parts.append(pencil + "".join(chr(int(point, 16)) for point in points))
    if item.text:
        words = item.text.replace("|", "/")
        parts.append(words if len(words) <= 40 else words[:37] + "...")
    return " ".join(parts)


if __name__ == "__main__":
    main()
