"""Write a benchmark in M-BEIR layout, whole or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from puma_jax import artifacts
from puma_jax.data.demo.split import Split
from puma_jax.data.mbeir import (
    TASKS,
    Candidate,
    Instruction,
    Qrel,
    Query,
    write_candidates,
    write_instructions,
    write_qrels,
    write_queries,
)

_MANIFEST = "manifest.json"
_COUNTS = ("queries", "pools", "left_out")


def build_once(
    out: Path, job: Mapping[str, Any], write: Callable[[Path], Mapping[str, object]]
) -> bool:
    """Build a benchmark; return False if it is there already.

    The folder appears whole; an empty one that is there already is filled at the end.

    Args:
        out: Folder of the benchmark.
        job: What the bytes of the benchmark depend on.
        write: Writes all files except the manifest into a folder, and returns the counts that go
            into it.

    Raises:
        ArtifactError: The folder holds something else, or cannot be written.
    """
    if (out / _MANIFEST).exists():
        artifacts.claim(out, _MANIFEST, job, what="a benchmark", may_differ=_COUNTS)
        return False
    with artifacts.atomic_folder(out) as partial:
        counts = write(partial)
        artifacts.write_json(partial / _MANIFEST, {**job, **counts})
    return True


def write_records(
    root: Path,
    dataset: str,
    queries: Mapping[Split, Sequence[Query]],
    pools: Mapping[int, Sequence[Candidate]],
    union: Sequence[Candidate],
    instructions: Iterable[Instruction],
) -> dict[str, object]:
    """Write queries, pools, qrels and instructions; return how many queries and documents.

    Args:
        root: Folder of the benchmark.
        dataset: Its name.
        queries: Queries of each split.
        pools: Local pool of each task.
        union: Global pool.
        instructions: Instructions of all tasks.
    """
    for split, rows in queries.items():
        sets = {f"{dataset}_{split}": list(rows)}
        if split == "train":
            write_queries(root / "query/union_train/mbeir_union_up_train.jsonl", rows)
        else:
            sets = {
                f"{dataset}_task{task}_{split}": [query for query in rows if query.task == task]
                for task in pools
            }
        for name, some in sets.items():
            write_queries(root / f"query/{split}/mbeir_{name}.jsonl", some)
            write_qrels(
                root / f"qrels/{split}/mbeir_{name}_qrels.txt",
                (Qrel(query.qid, did, 1, query.task) for query in some for did in query.positives),
            )
        write_candidates(root / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl", union)
    for task, pool in pools.items():
        write_candidates(root / f"cand_pool/local/mbeir_{dataset}_task{task}_cand_pool.jsonl", pool)
    write_instructions(root / "instructions/query_instructions.tsv", instructions)
    return {
        "queries": {
            split: dict(sorted(Counter(f"task{query.task}" for query in rows).items()))
            for split, rows in queries.items()
        },
        "pools": {f"task{task}": len(pool) for task, pool in pools.items()}
        | {"global": len(union)},
    }


def instructions_of(
    dataset: str, dataset_id: str, prompts: Mapping[int, tuple[str, ...]]
) -> list[Instruction]:
    """Return the instructions of tasks; the pair of modalities identifies the task.

    Args:
        dataset: Name of the dataset.
        dataset_id: Its id.
        prompts: Instructions of each task.
    """
    return [
        Instruction(
            query_modality=query,
            candidate_modality=candidate,
            dataset_name=dataset,
            dataset_id=dataset_id,
            prompts=texts,
        )
        for task, texts in prompts.items()
        for query, candidate in [TASKS[task]]
    ]
