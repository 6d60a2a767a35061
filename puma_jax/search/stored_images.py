"""Images that a corpus stores in its rows: kept as files beside the vectors, named by content.

Whoever shows what was found opens files: a page, a service, a table on a terminal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from puma_jax.artifacts import atomic_file
from puma_jax.search.records import ItemRecord

FOLDER = "images"


def keep_image(folder: Path, content: bytes) -> Path:
    """Return the file that holds an image in a folder of vectors; it is written if it is missing.

    Raises:
        ArtifactError: The file cannot be written.
    """
    name = hashlib.sha256(content).hexdigest()
    path = folder / FOLDER / name[:2] / name
    if not path.exists():
        with atomic_file(path) as partial:
            partial.write_bytes(content)
    return path


def remove_unused_images(folder: Path, records: Iterable[ItemRecord]) -> None:
    """Remove the files that `keep_image` wrote for items that are gone."""
    used = {Path(image.path).name for record in records for image in record.images}
    for path in (folder / FOLDER).glob("*/*"):
        if path.name not in used:
            path.unlink(missing_ok=True)
