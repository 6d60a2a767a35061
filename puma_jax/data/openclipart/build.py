"""Build the benchmark from a folder of SVG files into one in M-BEIR layout, whole or not at all."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from puma_jax.data.demo.drafts import subsample, with_ids
from puma_jax.data.demo.packages import demo_versions
from puma_jax.data.demo.pictures import in_threads, save_all
from puma_jax.data.demo.records import build_once, instructions_of, write_records
from puma_jax.data.demo.samples import contact_sheet
from puma_jax.data.demo.settings import Settings as DemoSettings
from puma_jax.data.openclipart.catalogue import (
    DATASET,
    DATASET_ID,
    image_path,
    make_catalogue,
)
from puma_jax.data.openclipart.metadata import read_clips
from puma_jax.data.openclipart.pictures import is_blank, render
from puma_jax.data.openclipart.queries import (
    PROMPTS,
    keyword_queries,
    name_queries,
    picture_queries,
)
from puma_jax.errors import ConfigError

_CREDIT = """\
The pictures under mbeir_images/ and in samples.png are from the Open Clip Art Library
(http://www.openclipart.org), by way of the Debian package openclipart-svg. Their authors put them
into the public domain. They were rendered to pixels.
"""


@dataclass(frozen=True)
class Settings(DemoSettings):
    """Settings of a build; the same settings, files and packages give the same bytes."""

    svg: Path = Path("/usr/share/openclipart/svg")
    """Folder of the SVG files: that of the Debian package openclipart-svg."""


def build(settings: Settings) -> bool:
    """Build the benchmark in `settings.out`; return False if it is there already.

    Raises:
        ConfigError: A demo package is not installed, or there are no SVG files.
        ArtifactError: The folder holds something else, or cannot be written.
    """
    paths = _svg_paths(settings.svg)
    job = {
        "name": DATASET,
        "seed": settings.seed,
        "size": settings.size,
        "packages": demo_versions(["resvg-py"]),
        "license": "public domain",
        "svg": _digest(settings.svg, paths),
    }
    return build_once(settings.out, job, lambda root: _write(root, settings, paths))


def _svg_paths(folder: Path) -> list[str]:
    """Return the paths of all SVG files below a folder, without ".svg", ascending."""
    files = folder.rglob("*.svg") if folder.is_dir() else ()
    found = sorted(file.relative_to(folder).as_posix().removesuffix(".svg") for file in files)
    if not found:
        raise ConfigError(
            f"{folder} has no SVG files: run apt-get install openclipart-svg; or apt-get download "
            "openclipart-svg, dpkg-deb -x openclipart-svg_*.deb DIR, and give --svg "
            "DIR/usr/share/openclipart/svg"
        )
    return found


def _digest(folder: Path, paths: Sequence[str]) -> str:
    """Return a digest of the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        content = hashlib.sha256((folder / f"{path}.svg").read_bytes()).hexdigest()
        digest.update(f"{content} {path}\n".encode())
    return digest.hexdigest()


def _write(root: Path, settings: Settings, paths: Sequence[str]) -> dict[str, object]:
    """Write all files except the manifest, and return the counts that go into it."""
    (root / "ATTRIBUTION.txt").write_text(_CREDIT, encoding="utf-8")
    clips, left_out = read_clips(settings.svg, paths)
    files = [settings.svg / f"{clip.path}.svg" for clip in clips]
    rendered = in_threads(partial(render, size=settings.size), "render", settings.workers, files)
    shown = [
        (clip, picture)
        for clip, picture in zip(clips, rendered, strict=True)
        if picture is not None and not is_blank(picture)
    ]
    failed = sum(picture is None for picture in rendered)
    left_out += Counter({"not rendered": failed, "blank": len(clips) - failed - len(shown)})
    print(
        f"{len(shown)} of {len(paths)} pictures are used; left out: "
        + ", ".join(f"{number} {reason}" for reason, number in sorted(left_out.items()))
    )
    if not shown:
        raise ConfigError(f"{settings.svg} has no picture that can be used")
    catalogue = make_catalogue(
        [clip for clip, _ in shown], np.stack([picture for _, picture in shown]), settings.seed
    )
    drafts = [*name_queries(catalogue), *keyword_queries(catalogue), *picture_queries(catalogue)]
    queries = with_ids(subsample(drafts, settings.seed), DATASET_ID, PROMPTS)
    save_all(
        [root / image_path(clip.path) for clip, _ in shown],
        [picture for _, picture in shown],
        settings.workers,
    )
    pools = {0: list(catalogue.pictures.values()), 3: list(catalogue.names.values())}
    union = [*pools[0], *pools[3]]
    contact_sheet(root, queries["test"], union, PROMPTS).save(root / "samples.png")
    instructions = instructions_of(DATASET, DATASET_ID, PROMPTS)
    counts = write_records(root, DATASET, queries, pools, union, instructions)
    return {**counts, "left_out": dict(sorted(left_out.items()))}
