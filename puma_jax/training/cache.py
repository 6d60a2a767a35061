"""Cache of the teacher's states, computed once for every item that a step may draw.

```
teacher/{stage}/
  cache.json    the teacher and the items
  states.npy    float32, one row per item
  digests.npy   SHA-256 of the states of each window of items; zeros where they are not computed
```
A window whose states do not have their digest is computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from puma_jax.artifacts import atomic_file, claim
from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.data.items import Item
from puma_jax.data.packing import fill, place
from puma_jax.data.pipeline import Batch, Loader, batches, prefetch_to_device
from puma_jax.data.preparing import prepare
from puma_jax.data.shapes import batch_shape
from puma_jax.errors import CheckpointError
from puma_jax.forward import map_chunks
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import replicated
from puma_jax.progress import Progress
from puma_jax.rows import PackedBatch, PackedShape
from puma_jax.training.cache_index import Index
from puma_jax.training.objective import TeacherStates
from puma_jax.training.step import FrozenParams
from puma_jax.training.teacher import TeacherFn
from puma_jax.typing import AnyArray, Array, Float, Int, ndarray

_ABOUT_FILE = "cache.json"
_STATES_FILE = "states.npy"
_DIGESTS_FILE = "digests.npy"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class TeacherCache:
    """The teacher's states of all items that a step may draw."""

    index: Index
    states: Float[ndarray, "items width"]
    """Memory-mapped from a file."""

    def of_pairs(self, batch: Batch) -> TeacherStates:
        """Return the states of a batch on the host, as NumPy arrays."""
        query = None
        if self.index.has_queries:
            query = self.states[self.index.query(batch.query, batch.prompt)]
        return TeacherStates(
            query=query,
            candidate=self.states[self.index.candidate(batch.candidate)],
        )


def build(
    folder: Path,
    loader: Loader,
    teacher_fn: TeacherFn,
    frozen_params: FrozenParams,
    *,
    items: Literal["pairs", "candidates"],
    model: ModelConfig,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
) -> TeacherCache:
    """Return the cache in a folder; compute the states that it lacks first.

    Every window of items is on disk as soon as it is computed: rerun the same call after a kill.
    States that were damaged on disk are computed again, and named in a line.

    Args:
        folder: Folder of this cache alone.
        loader: Reads the items; its plan says which there are.
        teacher_fn: Function from `make_teacher`, for the data shards of this mesh.
        frozen_params: Leaves of the teacher, and frozen leaves of the student.
        items: Items whose states are computed; see `DistillConfig.items`.
        model: Config of the teacher.
        compute: How to run.
        mesh: Devices over which rows are sharded.

    Raises:
        ArtifactError: The folder holds the states of another teacher or of other items, or the
            disk is full.
        CheckpointError: A file is not of this cache.
        DataError: See `Loader`.
    """
    index = Index.of(loader.plan, items)
    windows = _Windows(loader, index)
    about = {
        **dataclasses.asdict(model),
        "dtype": compute.dtype,
        "weights": _checksum(frozen_params),
        "items": len(index),
        "windows": windows.count,
        "data": windows.checksum(),
    }
    first = multihost.is_process_zero()
    multihost.on_process_zero(lambda: _allocate(folder, about, model.decoder.width))
    states, digests = _open(folder, about, model.decoder.width, "r+" if first else "r")
    missing = multihost.from_process_zero(lambda: _missing(folder, windows, states, digests))
    _compute(missing, windows, states, digests, teacher_fn, frozen_params, mesh)
    multihost.on_process_zero(lambda: None)  # a barrier: the file is written before it is read
    return TeacherCache(index, _open(folder, about, model.decoder.width, "r")[0])


def _compute(
    missing: Sequence[int],
    windows: _Windows,
    states: np.memmap,
    digests: np.memmap,
    teacher_fn: TeacherFn,
    frozen_params: FrozenParams,
    mesh: jax.sharding.Mesh,
) -> None:
    """Compute the states of some windows. All processes compute; process 0 writes."""
    if not missing:
        return
    first = multihost.is_process_zero()
    compiled = jax.jit(teacher_fn, out_shardings=replicated(mesh))
    encode = functools.partial(compiled, frozen_params.teacher, frozen_params.student)

    def start(window: _Window) -> list[Array]:
        return map_chunks(encode, window.rows, mesh)

    total = len(windows.lengths)
    before = total - sum(len(windows.items(number)) for number in missing)
    with Progress(
        total=total, initial=before, desc="teacher", unit="item", disable=not first
    ) as bar:
        read = batches(_Chosen(windows, missing), 0, len(missing))
        numbered = zip(missing, prefetch_to_device(read, start), strict=True)
        for number, (window, chunks) in numbered:
            computed = np.concatenate(jax.device_get(chunks))[window.slot]
            if first:
                states[window.item] = computed
                states.flush()
                _note(digests, number, computed)
            bar.update(len(window.item))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Window:
    """A group of items, packed."""

    rows: PackedBatch
    """Packed items, with a leading axis of chunks."""
    item: Int[AnyArray, "items"]
    """Number of each item in the index."""
    slot: Int[AnyArray, "items"]
    """Slot of each item, counted over all chunks."""


class _Windows:
    """Reads and packs windows of items, each of about as many items as a step has.

    Items are sorted by size and assigned to the windows in turn. All windows then have nearly the
    same sizes, so rows of one shape, compiled once, hold any of them with little padding.
    """

    def __init__(self, loader: Loader, index: Index):
        plan = loader.plan
        self.loader = loader
        self.query, self.prompt, self.candidate = index.rows(plan)
        self.lengths, self.patches = index.sizes(plan)
        self.count = -(-len(index) // (2 * plan.config.batch_size))
        self._order = np.lexsort((self.lengths, self.patches))
        self._shape = self._fitting_shape()

    def items(self, number: int) -> Int[ndarray, "items"]:
        """Return the numbers of the items in a window."""
        return self._order[number :: self.count]

    def checksum(self) -> str:
        """Return a SHA-256 digest of the items' rows, prompts and sizes."""
        digest = hashlib.sha256()
        for column in (self.query, self.prompt, self.candidate, self.lengths, self.patches):
            digest.update(column.astype(np.int64).tobytes())
        return digest.hexdigest()

    def __call__(self, number: int) -> _Window:
        """Read and pack a window, and return it."""
        items = self.items(number)
        packing = place(self.lengths[items], self.patches[items], self._shape)
        vision = self.loader.plan.template.config.vision
        waits = self.loader.store.is_remote
        read = list(prepare(self._preparing, items.tolist(), waits=waits))
        return _Window(
            rows=fill(read, packing, self._shape, vision),
            item=items,
            slot=packing.chunk * self._shape.slots + packing.slot,
        )

    async def _preparing(self, number: int) -> Item:
        # An image that cannot be decoded is blank here as in a step, where its pair is not valid.
        size = int(self.lengths[number]), int(self.patches[number])
        if number < len(self.query):
            row, prompt = int(self.query[number]), int(self.prompt[number])
            return (await self.loader.query(row, prompt, size))[0]
        candidate = int(self.candidate[number - len(self.query)])
        return (await self.loader.candidate(candidate, size))[0]

    def _fitting_shape(self) -> PackedShape:
        """Return a shape for as many chunks as a step has that fits the fullest windows tightly."""
        sizes = self.lengths, self.patches
        window = np.arange(len(self._order)) % self.count
        fullest = {int(np.bincount(window, of[self._order]).argmax()) for of in sizes}
        return batch_shape(
            [tuple(of[self.items(number)] for of in sizes) for number in sorted(fullest)],
            self.loader.chunks,
            self.loader.shape.data_shards,
            (int(self.lengths.max()), int(self.patches.max())),
        )


@dataclass(frozen=True)
class _Chosen:
    """Reads some of the windows, counted from 0."""

    windows: _Windows
    numbers: Sequence[int]

    def __call__(self, number: int) -> _Window:
        return self.windows(self.numbers[number])


def _checksum(frozen_params: FrozenParams) -> int:
    """Return the sum of the teacher's weights, read as unsigned integers, modulo 2³².

    It does not depend on how leaves are divided between teacher and student, or over devices.
    """

    def words(leaf: Array) -> Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32).sum()

    return int(jax.jit(lambda tree: sum(map(words, jax.tree.leaves(tree))))(frozen_params))


def _shapes(about: dict[str, Any], width: int) -> dict[str, tuple[tuple[int, int], type]]:
    """Return the shape and the dtype of the arrays of a cache, by their files."""
    return {
        _STATES_FILE: ((about["items"], width), np.float32),
        _DIGESTS_FILE: ((about["windows"], _DIGEST_BYTES), np.uint8),
    }


def _allocate(folder: Path, about: dict[str, Any], width: int) -> None:
    """Make a folder that of a cache, or check that it is, and create the files that it lacks.

    They have their full size from the start: a full disk would kill a process that maps them.
    """
    claim(folder, _ABOUT_FILE, about, what="states of a teacher")
    for name, (shape, dtype) in _shapes(about, width).items():
        path = folder / name
        if path.exists():
            continue
        header = _header(shape, dtype)
        with atomic_file(path) as partial, partial.open("wb") as file:
            file.write(header)
            size = len(header) + math.prod(shape) * np.dtype(dtype).itemsize
            file.truncate(size)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)


def _open(
    folder: Path, about: dict[str, Any], width: int, mode: Literal["r", "r+"]
) -> list[np.memmap]:
    """Return the arrays of a cache, mapped: its states and its digests.

    Raises:
        CheckpointError: A file cannot be read, or is not of these items.
    """
    arrays = []
    for name, (shape, dtype) in _shapes(about, width).items():
        path, header = folder / name, _header(shape, dtype)
        try:
            with path.open("rb") as file:
                same = file.read(len(header)) == header
            size = len(header) + math.prod(shape) * np.dtype(dtype).itemsize
            if not same or path.stat().st_size != size:
                raise CheckpointError(
                    f"{path} is not {np.dtype(dtype).name}{list(shape)}: delete {folder}"
                )
            arrays.append(np.memmap(path, dtype, mode, len(header), shape))
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror or error}; delete {folder}"
            ) from error
    return arrays


def _header(shape: tuple[int, int], dtype: type) -> bytes:
    """Return the header of a `.npy` file."""
    header = io.BytesIO()
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _missing(folder: Path, windows: _Windows, states: ndarray, digests: ndarray) -> list[int]:
    """Return the windows whose states are not computed, or not as they were when they were."""
    missing = [
        number
        for number, digest in enumerate(digests)
        if not digest.any() or _digest(states[windows.items(number)]) != digest.tobytes()
    ]
    if damaged := int(digests[missing].any(axis=1).sum()):
        print(f"{folder}: {damaged} windows of states are damaged and computed again", flush=True)
    return missing


def _digest(states: ndarray) -> bytes:
    return hashlib.sha256(states.tobytes()).digest()


def _note(digests: np.memmap, number: int, states: ndarray) -> None:
    """Write the digest of a window, whose states are on disk."""
    digests[number] = np.frombuffer(_digest(states), np.uint8)
    digests.flush()
