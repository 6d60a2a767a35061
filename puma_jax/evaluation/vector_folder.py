"""Vectors kept in a folder while an evaluation runs: memory may be small, and a rerun resumes.

A file holds the vectors of one batch. Its name says what was read (texts, and the paths, sizes and
times of images) and what the file holds, so that neither another input nor a damaged file is taken
for finished work.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from puma_jax.artifacts import atomic_file, lock, writing
from puma_jax.embedder import RawItem
from puma_jax.files import sha256_of
from puma_jax.parallel import multihost
from puma_jax.typing import Float, Int, ndarray

_DIGITS = 32
_FILE = re.compile(f"[0-9a-f]{{{_DIGITS}}}-[0-9a-f]{{{_DIGITS}}}\\.npy")


@contextlib.contextmanager
def vector_folder(folder: Path, job: Any) -> Iterator[VectorFolder]:
    """Yield a folder for the vectors of a job, which is removed if the block ends well.

    Each process has a folder of its own, so that the disk may be local or shared.

    Args:
        folder: Folder that holds those of all jobs; made if it is missing.
        job: What decides the vectors besides the items, such as the model's fingerprint, as JSON
            has it.

    Raises:
        ArtifactError: Another process runs the same job, or the folder cannot be written.
    """
    count, number = jax.process_count(), jax.process_index()
    own = folder / sha256_of([job, count, number])[:16]
    with lock(own):
        vectors = VectorFolder(own)
        yield vectors
        vectors.remove()


class VectorFolder:
    """The vectors of batches that are embedded."""

    def __init__(self, folder: Path):
        """Use a folder that exists."""
        self.folder = folder
        self.reused = 0
        """Number of vectors that were there before."""

    @staticmethod
    def key(items: Sequence[RawItem]) -> str:
        """Return a digest of what the vectors of items are made of."""
        return sha256_of(
            [
                [item.get("text"), *_state(item.get("image"))]
                + ([item["instruction"]] if "instruction" in item else [])
                for item in items
            ]
        )

    def read(self, key: str, count: int) -> Float[ndarray, "n width"] | None:
        """Return the vectors of a batch; None if some process does not have them.

        A damaged file is removed. All processes call this together.
        """
        found = None
        for path in self.folder.glob(f"{key[:_DIGITS]}-*.npy"):
            if _FILE.fullmatch(path.name):
                found = _load(path, count)
                if found is None:
                    with writing(path):
                        path.unlink()
        if not multihost.all_processes(found is not None):
            return None
        self.reused += count
        return found

    def write(self, key: str, vectors: Float[ndarray, "n width"]) -> Float[ndarray, "n width"]:
        """Write the vectors of a batch, and return them as the file holds them.

        Raises:
            ArtifactError: The file cannot be written.
        """
        path = self.folder / f"{key[:_DIGITS]}-{_digest(vectors)}.npy"
        with atomic_file(path) as partial, open(partial, "wb") as file:
            np.save(file, vectors)
        return np.load(path, mmap_mode="r")

    def remove(self) -> None:
        """Remove the files and the folder, if nothing else is in it."""
        with writing(self.folder):
            for path in self.folder.iterdir():
                if _FILE.fullmatch(path.name) or path.name == ".lock":
                    path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class GatheredRows:
    """Rows of a large array, read when needed from arrays that hold some of them each."""

    def __init__(self, rows: int, width: int):
        """Start with rows that no array holds; reading these is undefined."""
        self.width = width
        self._parts: list[ndarray] = []
        self._part_of, self._place_of = np.zeros((2, rows), np.int64)

    def __setitem__(self, rows: Int[ndarray, "n"], part: Float[ndarray, "n width"]) -> None:
        """Let an array hold some rows; it stays where it is."""
        self._part_of[rows], self._place_of[rows] = len(self._parts), np.arange(len(rows))
        self._parts.append(part)

    def __getitem__(self, rows: Int[ndarray, "n"]) -> Float[ndarray, "n width"]:
        """Return some rows in memory."""
        out = np.empty((len(rows), self.width), np.float32)
        for part in np.unique(self._part_of[rows]).tolist():
            here = np.flatnonzero(self._part_of[rows] == part)
            out[here] = self._parts[part][self._place_of[rows[here]]]
        return out


def _state(image: Any) -> tuple[Any, ...]:
    """Return what tells one state of an image file from another; null where there is none."""
    if image is None:
        return (None,)
    try:
        status = Path(image).stat()
    except OSError:
        return (str(image), None)
    return str(image), status.st_size, status.st_mtime_ns


def _load(path: Path, count: int) -> Float[ndarray, "n width"] | None:
    """Return the vectors in a file; None if it is damaged."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, SyntaxError, EOFError):
        return None
    fits = vectors.ndim == 2 and len(vectors) == count and vectors.dtype == np.float32
    return vectors if fits and path.stem.endswith(f"-{_digest(vectors)}") else None


def _digest(vectors: ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()[:_DIGITS]
