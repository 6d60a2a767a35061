"""Cache of the teacher's states, computed once for every item that a step may draw.

```
teacher/{stage}/
  cache.json    the teacher, the items, and how many windows of items are done
  states.npy    float32, one row per item
```
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from puma_jax.artifacts import write_json
from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.data.items import Item
from puma_jax.data.packing import fill, place
from puma_jax.data.pipeline import Batch, Loader, batches, prefetch_to_device
from puma_jax.data.plan import Plan
from puma_jax.data.shapes import batch_shape
from puma_jax.errors import CheckpointError
from puma_jax.forward import map_chunks
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import replicated
from puma_jax.rows import PackedBatch, PackedShape
from puma_jax.training.step import FrozenParams, PairStates
from puma_jax.training.teacher import TeacherFn
from puma_jax.typing import AnyArray, Array, Float, Int, ndarray

_ABOUT_FILE = "cache.json"
_STATES_FILE = "states.npy"


@dataclass(frozen=True)
class Index:
    """Numbers of all items that a step may draw: queries with each prompt, then candidates."""

    start: Int[ndarray, "rows_and_end"]
    """Number of the first item of each query, then of each candidate; last, the item count."""
    queries: int
    """Number of rows in the table of queries."""

    @classmethod
    def of(cls, plan: Plan) -> Index:
        """Return the index of a plan's queries and of their positives."""
        table = plan.table
        queries = len(table.query_key)
        drawn = np.zeros(queries, bool)
        drawn[plan.queries()] = True
        wordings = np.where(drawn, np.maximum(plan.prompts(np.arange(queries)), 1), 0)
        items = np.concatenate([[0], wordings, plan.candidates()])
        return cls(np.cumsum(items, dtype=np.int64), queries)

    def __len__(self) -> int:
        return int(self.start[-1])

    def query(self, row: Int[ndarray, "n"], prompt: Int[ndarray, "n"]) -> Int[ndarray, "n"]:
        """Return the item numbers of queries with these prompts; prompt −1 is none."""
        return self.start[row] + np.maximum(prompt, 0)

    def candidate(self, row: Int[ndarray, "n"]) -> Int[ndarray, "n"]:
        """Return the item numbers of candidates."""
        return self.start[self.queries + row]


@dataclass(frozen=True)
class TeacherCache:
    """The teacher's states of all items that a step may draw."""

    index: Index
    states: Float[ndarray, "items width"]
    """Memory-mapped from a file."""

    def pair_states(self, batch: Batch) -> PairStates:
        """Return the states of a batch on the host, as NumPy arrays."""
        return PairStates(
            query=self.states[self.index.query(batch.query, batch.prompt)],
            candidate=self.states[self.index.candidate(batch.candidate)],
        )


def build(
    folder: Path,
    loader: Loader,
    teacher_fn: TeacherFn,
    frozen_params: FrozenParams,
    *,
    model: ModelConfig,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    workers: int = 0,
) -> TeacherCache:
    """Return the cache in a folder; compute the states that it lacks first.

    Every window of items is on disk as soon as it is computed: rerun the same call after a kill.

    Args:
        folder: Folder of this cache alone.
        loader: Reads the items; its plan says which there are.
        teacher_fn: Function from `make_teacher`, for the data shards of this mesh.
        frozen_params: Leaves of the teacher, and frozen leaves of the student.
        model: Config of the teacher.
        compute: How to run.
        mesh: Devices over which rows are sharded.
        workers: Number of processes that read items; 0 reads them in threads of this one.

    Raises:
        CheckpointError: The folder holds the states of another teacher or of other items, cannot
            be read, or the disk is full.
        DataError: See `Loader`.
    """
    index = Index.of(loader.plan)
    windows = _Windows(loader, index)
    about = {
        **dataclasses.asdict(model),
        "dtype": compute.dtype,
        "weights": _checksum(frozen_params),
        "items": len(index),
        "windows": windows.count,
        "data": windows.checksum(),
    }
    shape = len(index), model.decoder.width
    multihost.on_process_zero(lambda: _claim(folder, about, shape))
    done = _claim(folder, about, shape)
    if done == windows.count:
        return TeacherCache(index, _mapped(folder, "r"))
    first = multihost.is_process_zero()
    states = _mapped(folder, "r+" if first else "r")
    # All processes compute; process 0 writes.
    compiled = jax.jit(teacher_fn, out_shardings=replicated(mesh))
    encode = functools.partial(compiled, frozen_params.teacher, frozen_params.student)

    def start(window: _Window) -> list[Array]:
        return map_chunks(encode, window.rows, mesh)

    before = sum(len(windows.items(number)) for number in range(done))
    with tqdm(
        total=len(index), initial=before, desc="teacher", unit="item", disable=not first
    ) as bar:
        read = batches(windows, done, windows.count, workers=workers)
        for window, chunks in prefetch_to_device(read, start):
            computed = np.concatenate(jax.device_get(chunks))[window.slot]
            done += 1
            if first:
                states[window.item] = computed
                states.flush()
                _note(folder, about, done)
            bar.update(len(window.item))
    multihost.on_process_zero(lambda: None)  # a barrier: the file is written before it is read
    return TeacherCache(index, _mapped(folder, "r"))


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
        counts = np.diff(index.start)
        self.query = np.repeat(np.arange(index.queries), counts[: index.queries])
        self.candidate = np.flatnonzero(counts[index.queries :])
        prompt = np.arange(len(self.query)) - index.start[self.query]
        self.prompt = np.where(plan.prompts(self.query) > 0, prompt, -1)
        sizes = plan.query_sizes(self.query, self.prompt), plan.candidate_sizes(self.candidate)
        self.lengths, self.patches = (np.concatenate(both) for both in zip(*sizes, strict=True))
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
        return _Window(
            rows=fill([*map(self._read, items.tolist())], packing, self._shape, vision),
            item=items,
            slot=packing.chunk * self._shape.slots + packing.slot,
        )

    def _read(self, number: int) -> Item:
        # An image that cannot be decoded is blank here as in a step, where its pair is not valid.
        size = int(self.lengths[number]), int(self.patches[number])
        if number < len(self.query):
            row, prompt = int(self.query[number]), int(self.prompt[number])
            return self.loader.query(row, prompt, size)[0]
        return self.loader.candidate(int(self.candidate[number - len(self.query)]), size)[0]

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


def _checksum(frozen_params: FrozenParams) -> int:
    """Return the sum of the teacher's weights, read as unsigned integers, modulo 2³².

    It does not depend on how leaves are divided between teacher and student, or over devices.
    """

    def words(leaf: Array) -> Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32).sum()

    return int(jax.jit(lambda tree: sum(map(words, jax.tree.leaves(tree))))(frozen_params))


def _claim(folder: Path, about: dict[str, Any], shape: tuple[int, int]) -> int:
    """Create the folder of this cache, or check an existing one; return how many windows it has."""
    path = folder / _ABOUT_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _allocate(folder / _STATES_FILE, shape)
        _note(folder, about, 0)
        return 0
    try:
        found = json.loads(path.read_text("utf-8"))
        done = int(found["done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    for name, value in json.loads(json.dumps(about)).items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{folder} holds states of another teacher or of other items, with {name} "
                f"{found.get(name)}, expected {value}: delete it, or choose another --workdir"
            )
    return done


def _allocate(path: Path, shape: tuple[int, int]) -> None:
    """Create the file of states at its full size: a full disk would kill a process that maps it."""
    try:
        np.lib.format.open_memmap(path, "w+", np.float32, shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} of {4 * shape[0] * shape[1] / 1e9:.1f} GB cannot be written: "
            f"{error.strerror or error}"
        ) from error


def _mapped(folder: Path, mode: Literal["r", "r+"]) -> np.memmap:
    path = folder / _STATES_FILE
    try:
        return np.lib.format.open_memmap(path, mode)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error}; delete {path.parent}")


def _note(folder: Path, about: dict[str, Any], done: int) -> None:
    """Write what the cache holds, and how many of its windows are done."""
    write_json(folder / _ABOUT_FILE, {**about, "done": done})
