"""Build the benchmark from packages into a folder in M-BEIR layout, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from puma_jax.data.mbeir import (
    TASKS,
    Qrel,
    Query,
    write_candidates,
    write_instructions,
    write_qrels,
    write_queries,
)
from puma_jax.data.openmoji.catalogue import (
    DATASET,
    DATASET_ID,
    Documents,
    color_path,
    line_path,
    make_concepts,
    make_documents,
)
from puma_jax.data.openmoji.countries import load_countries
from puma_jax.data.openmoji.drafts import Draft, drop_unanswerable, subsample
from puma_jax.data.openmoji.drawings import drawing_stems, render, save_all
from puma_jax.data.openmoji.flags import facts_task, neighbor_task, question_task
from puma_jax.data.openmoji.instructions import instructions
from puma_jax.data.openmoji.names import load_names
from puma_jax.data.openmoji.naming import naming_tasks
from puma_jax.data.openmoji.packages import LICENSES, demo_versions
from puma_jax.data.openmoji.picturing import edit_task, line_task
from puma_jax.data.openmoji.samples import contact_sheet
from puma_jax.data.openmoji.split import SPLITS, Split
from puma_jax.errors import ConfigError, DataError

_MANIFEST = "manifest.json"
_SIZE_UNIT = 28  # 2 × 2 patches of 14 pixels, one visual token
_ATTRIBUTION = "ATTRIBUTION.txt"
_CREDIT = """\
The drawings under mbeir_images/ and in samples.png are by OpenMoji, the open-source emoji and icon
project (https://openmoji.org). License: CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). They were rendered to pixels; for the line
drawings, the colors were left out. Redistribute them under the same license.
"""


@dataclass(frozen=True)
class Settings:
    """Settings of a build; the same settings and packages give the same bytes."""

    out: Path
    """Folder to write; it must be missing, empty, or a finished build with these settings."""
    seed: int = 0
    """Seed of every random choice: which names are used, which combinations are held out."""
    size: int = 56
    """Width and height of the drawings in pixels, a multiple of 28; 56 gives 4 visual tokens."""
    workers: int = os.cpu_count() or 1
    """Number of rendering threads; the result does not depend on it."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: The size is not a multiple of 28, or the number of workers is below 1.
        """
        if self.size < _SIZE_UNIT or self.size % _SIZE_UNIT:
            raise ConfigError(f"size {self.size} is not a multiple of {_SIZE_UNIT}, such as 56")
        if self.workers < 1:
            raise ConfigError(f"workers {self.workers} is not a number of threads, 1 or more")


def build(settings: Settings, stems: Sequence[str] | None = None) -> bool:
    """Build the benchmark in `settings.out`; return False if it is there already.

    Files are written to "{out}.partial" beside it, which is renamed once it is complete.

    Args:
        settings: What to build, and where.
        stems: Names of the drawings to use; None uses all that have a Unicode name.

    Raises:
        ConfigError: A demo package is not installed, or the folder holds something else.
        DataError: The folder cannot be written.
    """
    key = {"seed": settings.seed, "size": settings.size, "packages": demo_versions()}
    out = settings.out.resolve()
    if _is_built(out, key):
        return False
    partial = out.with_name(out.name + ".partial")
    try:
        if (partial / _ATTRIBUTION).is_file():
            shutil.rmtree(partial)  # left by an interrupted build
        partial.mkdir(parents=True)
        (partial / _ATTRIBUTION).write_text(_CREDIT, encoding="utf-8")
        counts = _write(partial, settings, stems)
        manifest = {"name": DATASET, **key, "licenses": LICENSES, **counts}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        partial.replace(out)
    except FileExistsError:
        raise ConfigError(f"{partial} exists and was not left by a build: remove it") from None
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    return True


def _is_built(out: Path, key: dict[str, object]) -> bool:
    """Return whether a finished build is there; refuse a folder that holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = json.loads((out / _MANIFEST).read_text(encoding="utf-8"))
        found = {name: manifest[name] for name in key}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{out} exists and is not a build of this benchmark: choose another folder"
        ) from None
    for name, wanted in key.items():
        if found[name] != wanted:
            raise ConfigError(
                f"{out} was built with {name} {found[name]}, wanted {wanted}: "
                "choose another folder, or delete this one"
            )
    return True


def _write(root: Path, settings: Settings, stems: Sequence[str] | None) -> dict[str, object]:
    """Write all files except the manifest, and return the counts that go into it."""
    names = load_names()
    stems = sorted(stem for stem in (drawing_stems() if stems is None else stems) if stem in names)
    names = {stem: names[stem] for stem in stems}
    colors, lines = render(stems, settings.size, settings.workers)
    concepts = make_concepts(stems, names, colors, lines, settings.seed)
    appearances = {concept.stem: concept.appearance for concept in concepts}
    countries = load_countries(names)
    documents = make_documents(concepts, countries)
    drafts = drop_unanswerable(
        [
            *naming_tasks(concepts, documents, settings.seed),
            *line_task(concepts, documents, settings.seed),
            *edit_task(concepts, documents),
            *facts_task(countries, documents, settings.seed),
            *question_task(countries, appearances, documents, settings.seed),
            *neighbor_task(countries, appearances, documents, settings.seed),
        ]
    )
    queries = _with_ids(subsample(drafts, settings.seed))
    pictures = {color_path(stem): color for stem, color in zip(stems, colors, strict=True)}
    query_images = {query.image for rows in queries.values() for query in rows}
    pictures |= {
        line_path(stem): line
        for stem, line in zip(stems, lines, strict=True)
        if line_path(stem) in query_images
    }
    save_all([root / path for path in pictures], list(pictures.values()), settings.workers)
    _write_records(root, queries, documents)
    contact_sheet(root, queries["test"], documents).save(root / "samples.png")
    return {
        "queries": {
            split: dict(sorted(Counter(f"task{query.task}" for query in rows).items()))
            for split, rows in queries.items()
        },
        "pools": {f"task{task}": len(documents.pool(task)) for task in TASKS}
        | {"global": len(documents.union())},
    }


def _with_ids(drafts: Sequence[Draft]) -> dict[Split, list[Query]]:
    """Return the queries of each split, ordered by task and numbered in one sequence."""
    numbers = count(1)
    return {
        split: [
            Query(
                qid=f"{DATASET_ID}:{next(numbers)}",
                text=draft.text,
                image=draft.image,
                modality=TASKS[task][0],
                positives=draft.positives,
                task=task,
                source=draft.combination,
            )
            for task in TASKS
            for draft in drafts
            if draft.task == task and draft.split == split
        ]
        for split in SPLITS
    }


def _write_records(root: Path, queries: dict[Split, list[Query]], documents: Documents) -> None:
    """Write queries, pools, qrels and instructions."""
    for split, rows in queries.items():
        sets = {f"{DATASET}_{split}": rows}
        if split == "train":
            write_queries(root / "query/union_train/mbeir_union_up_train.jsonl", rows)
        else:
            sets = {
                f"{DATASET}_task{task}_{split}": [query for query in rows if query.task == task]
                for task in TASKS
            }
        for name, some in sets.items():
            write_queries(root / f"query/{split}/mbeir_{name}.jsonl", some)
            write_qrels(
                root / f"qrels/{split}/mbeir_{name}_qrels.txt",
                (Qrel(query.qid, did, 1, query.task) for query in some for did in query.positives),
            )
        union = root / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
        write_candidates(union, documents.union())
    for task in TASKS:
        pool = root / f"cand_pool/local/mbeir_{DATASET}_task{task}_cand_pool.jsonl"
        write_candidates(pool, documents.pool(task))
    write_instructions(root / "instructions/query_instructions.tsv", instructions())
