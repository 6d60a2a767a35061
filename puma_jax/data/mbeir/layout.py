"""The files of a benchmark, found by their names in its folder.

```
query/{split}/mbeir_{set}_task{N}_{split}.jsonl     query/train/mbeir_{set}_train.jsonl
query/union_train/mbeir_union_up_train.jsonl        instructions/query_instructions.tsv
cand_pool/local/mbeir_{set}_task{N}[_{split}]_cand_pool.jsonl
cand_pool/global/mbeir_union_{split}_cand_pool.jsonl
qrels/{split}/mbeir_{set}[_task{N}]_{split}_qrels.txt
```
{set} is any name; {split} is any folder but train and union_train.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from puma_jax.data.lines import FilePath
from puma_jax.data.mbeir.records import TASKS
from puma_jax.errors import DataError


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """The queries of one dataset and task, the pool they search, and their relevance judgments.

    A missing pool or qrels file still has a path: where the file is expected.
    """

    name: str
    task: int
    split: str
    queries_path: Path
    pool_path: Path
    """Path of the local pool."""
    qrels_path: Path

    @property
    def missing(self) -> tuple[Path, ...]:
        """The paths of files that do not exist."""
        paths = (self.queries_path, self.pool_path, self.qrels_path)
        return tuple(path for path in paths if not path.is_file())


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The files of a folder in M-BEIR layout."""

    root: Path
    sets: tuple[EvaluationSet, ...]
    """The evaluation sets, sorted by split, task and name."""
    train: dict[str, Path]
    """Training queries of each dataset, by the name of the dataset."""
    union_train: Path | None
    """Training queries of all datasets."""
    local_pools: tuple[Path, ...]
    global_pools: dict[str, Path]
    """Documents of all datasets, by split; "train" has the positives of the training queries."""
    qrels: tuple[Path, ...]
    instructions: Path | None
    unknown: tuple[Path, ...]
    """Files in the folders of queries, pools or qrels whose names are not of the layout."""


def discover(root: FilePath) -> Benchmark:
    """Return the files of a benchmark. None of them is opened; any of them may be missing.

    Raises:
        DataError: The folder does not exist, holds no file of the layout, or has a file whose name
            has an unknown task.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    unknown: list[Path] = []
    sets = []
    for folder in sorted((root / "query").glob("*/")):
        if folder.name not in ("train", "union_train"):
            sets += _evaluation_sets(root, folder.name, unknown)
    qrels: list[Path] = []
    for folder in sorted((root / "qrels").glob("*/")):
        qrels += _named(folder, "mbeir_", "_qrels.txt", unknown).values()
    local_pools = _named(root / "cand_pool/local", "mbeir_", "_cand_pool.jsonl", unknown)
    benchmark = Benchmark(
        root=root,
        sets=tuple(sorted(sets, key=lambda found: (found.split, found.task, found.name))),
        train=_named(root / "query/train", "mbeir_", "_train.jsonl", unknown),
        union_train=_if_file(root / "query/union_train/mbeir_union_up_train.jsonl"),
        local_pools=tuple(local_pools.values()),
        global_pools=_named(root / "cand_pool/global", "mbeir_union_", "_cand_pool.jsonl", unknown),
        qrels=tuple(qrels),
        instructions=_if_file(root / "instructions/query_instructions.tsv"),
        unknown=tuple(unknown),
    )
    if not (sets or benchmark.train or benchmark.union_train or local_pools):
        raise DataError(
            f"{root} holds no benchmark in M-BEIR layout: there is no file such as "
            "query/test/mbeir_{set}_task{N}_test.jsonl or "
            "cand_pool/local/mbeir_{set}_task{N}_cand_pool.jsonl"
        )
    return benchmark


def _evaluation_sets(root: Path, split: str, unknown: list[Path]) -> list[EvaluationSet]:
    """Return the sets of one split."""
    sets = []
    for stem, path in _named(root / "query" / split, "mbeir_", f"_{split}.jsonl", unknown).items():
        parts = re.fullmatch("(.+)_task([0-9])", stem)
        if not parts:
            unknown.append(path)
            continue
        task = int(parts[2])
        if task not in TASKS:
            raise DataError(f"{path}: task {task} is not one of {', '.join(map(str, TASKS))}")
        pool = root / f"cand_pool/local/mbeir_{stem}_cand_pool.jsonl"
        # MSCOCO has a pool for each split.
        pool_of_split = root / f"cand_pool/local/mbeir_{stem}_{split}_cand_pool.jsonl"
        sets.append(
            EvaluationSet(
                name=parts[1],
                task=task,
                split=split,
                queries_path=path,
                pool_path=_if_file(pool_of_split) or pool,
                qrels_path=root / f"qrels/{split}/mbeir_{stem}_{split}_qrels.txt",
            )
        )
    return sets


def _if_file(path: Path) -> Path | None:
    """Return the path if there is such a file."""
    return path if path.is_file() else None


def _named(folder: Path, start: str, end: str, unknown: list[Path]) -> dict[str, Path]:
    """Return the files of a folder by the part of their names between start and end.

    Files with the same suffix and another name are added to `unknown`.
    """
    found = {}
    for path in sorted(folder.glob(f"*{Path(end).suffix}")):
        name = path.name
        if name.startswith("."):  # files of operating systems and editors
            continue
        if name.startswith(start) and name.endswith(end) and len(name) > len(start + end):
            found[name[len(start) : -len(end)]] = path
        else:
            unknown.append(path)
    return found
