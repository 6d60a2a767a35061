"""Write a benchmark anew, with other fields in the lines of its training queries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from puma_jax.artifacts import atomic_folder, link_or_copy, write_json, writing
from puma_jax.data.lines import json_object, numbered_lines, write_lines
from puma_jax.errors import ConfigError
from puma_jax.evaluation.training_set import TrainingSet

Fields = Callable[[int], dict[str, Any]]
"""Returns the fields to set in the line of a query, by its row."""


def rewrite(
    data: TrainingSet, fields: Fields, out: Path, manifest: str, about: dict[str, Any]
) -> None:
    """Write a benchmark with other training queries; the folder appears whole, or not at all.

    All other files are hard links where the file system allows them, else copies.

    Args:
        data: The training queries, and where they are.
        fields: Fields to set; others that a line has stay as they are.
        out: Folder to write.
        manifest: Name of a file that says how the fields were made.
        about: Its content.

    Raises:
        ArtifactError: The folder is not empty, or cannot be written.
        DataError: A file of queries can no longer be read.
    """
    replaced = {index.path for index in data.query_files}
    with atomic_folder(out) as partial, writing(out):

        def ignored(folder: str, names: list[str]) -> list[str]:
            return [name for name in names if name == manifest or Path(folder, name) in replaced]

        shutil.copytree(
            data.root,
            partial,
            symlinks=True,
            ignore=ignored,
            copy_function=link_or_copy,
            dirs_exist_ok=True,
        )
        for number, index in enumerate(data.query_files):
            path = partial / index.path.relative_to(data.root)
            write_lines(path, _lines(data, fields, number))
        write_json(partial / manifest, about)


def check_places(root: Path, out: Path, vectors_dir: Path | None) -> None:
    """Refuse folders within each other.

    Raises:
        ConfigError: The output or the vectors lie in the benchmark, or the vectors in the output.
    """
    for name, inner, outer in (
        ("out", out, root),
        ("vectors_dir", vectors_dir, root),
        ("vectors_dir", vectors_dir, out),
    ):
        if inner is not None and inner.resolve().is_relative_to(outer.resolve()):
            raise ConfigError(f"{name} {inner} lies in {outer}: choose a folder outside of it")


def _lines(data: TrainingSet, fields: Fields, file: int) -> Iterator[str]:
    """Yield the lines of a file of queries."""
    index = data.query_files[file]
    own = np.flatnonzero(data.locations[:, 0] == file)
    query_of_line = dict(
        zip(index.line_numbers[data.locations[own, 1]].tolist(), own.tolist(), strict=True)
    )
    for line in numbered_lines(index.path):
        if line.content.isspace():
            continue
        query = query_of_line.get(line.number)
        if query is None:  # a bad record, which stays one
            yield line.content.decode("utf-8", "replace").rstrip("\r\n")
            continue
        yield json.dumps(json_object(line.content) | fields(query), ensure_ascii=False)
