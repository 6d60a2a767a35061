"""What a demo run found, as a table of emoji: the picture in the README, without the art.

    python benchmarks/emoji_table.py --run runs/demo-full/results/mac --root runs/openmoji

The drawings are CC BY-SA and no part of the repository; each stands for an emoji, which is a
character. Queries are taken at equal distances among those of each task.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from puma_jax.data import mbeir
from puma_jax.retrieval.report import POOLS, markdown

FOUND = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="results of a stage")
    parser.add_argument("--root", type=Path, required=True, help="the demo benchmark")
    parser.add_argument("--queries", type=int, default=2, help="of each task")
    parser.add_argument("--pool", choices=POOLS, default="local", help="where they looked")
    given = parser.parse_args()

    benchmark = mbeir.discover(given.root)
    pool = {row.did: row for row in mbeir.read_candidates(benchmark.global_pools["test"])}
    rows = []
    for asked in benchmark.sets:
        if asked.split != "test":
            continue
        queries = list(mbeir.read_queries(asked.queries_path))
        found = ranked(given.run / f"mbeir_{asked.name}_task{asked.task}_test_{given.pool}_run.txt")
        step = len(queries) // given.queries
        for query in queries[step // 2 :: step][: given.queries]:
            answers = set(query.positives)
            cells = [
                f"**{shown(pool[did])}**" if did in answers else shown(pool[did])
                for did in found[query.qid][:FOUND]
            ]
            rows.append([str(asked.task), shown(query), *cells])
    print(markdown(["task", "query", *map(str, range(1, FOUND + 1))], rows))


def ranked(path: Path) -> dict[str, list[str]]:
    """Return the documents of each query in a TREC run file, best first."""
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        qid, _, did, *_ = line.split()
        found.setdefault(qid, []).append(did)
    return found


def shown(item: mbeir.Query | mbeir.Candidate) -> str:
    """Return an item as text: the emoji of its drawing, "✎" before it for lines, and its words."""
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
