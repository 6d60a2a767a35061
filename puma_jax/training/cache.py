"""The states of a teacher, which never changes, computed once for all that steps may hold.

```
teacher/{stage}/
  cache.json    whose states of what items these are, and how many windows of them are done
  states.npy    float32, a row for each item
```
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.data.items import Item
from puma_jax.data.packing import fill, place
from puma_jax.data.pipeline import Batch, Loader, batches, on_device
from puma_jax.data.plan import Plan
from puma_jax.data.shapes import batch_shape
from puma_jax.errors import CheckpointError
from puma_jax.files import write_json
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import batch_sharding, replicated
from puma_jax.rows import Rows, RowShape
from puma_jax.training.step import Fixed, Targets
from puma_jax.training.teacher import Teach
from puma_jax.typing import AnyArray, Array, Float, Int, ndarray

_ABOUT_FILE = "cache.json"
_STATES_FILE = "states.npy"


@dataclass(frozen=True)
class Index:
    """Numbers of all items that steps may hold: queries with each prompt, then candidates."""

    start: Int[ndarray, "rows_and_end"]
    """Number of the first item of each query and then of each candidate; last, of all items."""
    queries: int
    """Rows of the table of queries."""

    @classmethod
    def of(cls, plan: Plan) -> Index:
        """Return the index of what a plan may draw: its queries, and the positives of these."""
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
        """Return the numbers of queries asked with these prompts, −1 for none."""
        return self.start[row] + np.maximum(prompt, 0)

    def candidate(self, row: Int[ndarray, "n"]) -> Int[ndarray, "n"]:
        """Return the numbers of candidates."""
        return self.start[self.queries + row]


@dataclass(frozen=True)
class TeacherCache:
    """The teacher's states of all items that steps may hold."""

    index: Index
    states: Float[ndarray, "items width"]
    """Mapped from a file."""

    def targets(self, batch: Batch) -> Targets:
        """Return the states for a batch as it is on the host; they are NumPy arrays too."""
        return Targets(
            query=self.states[self.index.query(batch.query, batch.prompt)],
            candidate=self.states[self.index.candidate(batch.candidate)],
        )


def build(
    folder: Path,
    loader: Loader,
    teach: Teach,
    fixed: Fixed,
    *,
    model: ModelConfig,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    workers: int = 0,
) -> TeacherCache:
    """Return the cache in a folder, once all that it lacks is computed.

    What is done is on disk after every window of items: after a kill the same call goes on.

    Args:
        folder: Of this cache alone.
        loader: Whose plan says which items there are; it also reads them.
        teach: From `make_teacher`, for the groups of this mesh.
        fixed: The teacher, and what the student leaves frozen.
        model: Config of the teacher.
        compute: How to run.
        mesh: Devices that rows are spread over.
        workers: Processes that read items; 0 reads them in threads of this one.

    Raises:
        CheckpointError: The folder holds the states of another teacher or of other items, cannot
            be read, or has no room.
        DataError: See `Loader`.
    """
    index = Index.of(loader.plan)
    windows = _Windows(loader, index)
    about = {
        **dataclasses.asdict(model),
        "dtype": compute.dtype,
        "weights": _checksum(fixed),
        "items": len(index),
        "windows": windows.count,
        "data": windows.checksum(),
    }
    shape = len(index), model.decoder.width
    multihost.once(lambda: _claim(folder, about, shape))
    done = _claim(folder, about, shape)
    if done == windows.count:
        return TeacherCache(index, _mapped(folder, "r"))
    first = multihost.is_first()
    states = _mapped(folder, "r+" if first else "r")
    # Every process computes with the others; the first one writes.
    compiled, by_rows = jax.jit(teach, out_shardings=replicated(mesh)), batch_sharding(mesh)

    def start(window: _Window) -> list[Array]:
        chunks = range(len(window.rows.ret))
        rows = [jax.tree.map(operator.itemgetter(chunk), window.rows) for chunk in chunks]
        placed = [
            jax.tree.map(lambda part: multihost.put(part, by_rows), of_chunk) for of_chunk in rows
        ]
        return [compiled(fixed.teacher, fixed.frozen, of_chunk) for of_chunk in placed]

    before = sum(len(windows.items(number)) for number in range(done))
    with tqdm(
        total=len(index), initial=before, desc="teacher", unit="item", disable=not first
    ) as bar:
        read = batches(windows, done, windows.count, workers=workers)
        for window, chunks in on_device(read, start):
            found = np.concatenate(jax.device_get(chunks))[window.slot]
            done += 1
            if first:
                states[window.item] = found
                states.flush()
                _note(folder, about, done)
            bar.update(len(window.item))
    multihost.once(lambda: None)  # what is read next is written
    return TeacherCache(index, _mapped(folder, "r"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Window:
    """Some items, packed."""

    rows: Rows
    """With a leading axis of chunks."""
    item: Int[AnyArray, "items"]
    """Their numbers in the index."""
    slot: Int[AnyArray, "items"]
    """Where the state of each is found, in those of all slots of all chunks."""


class _Windows:
    """Reads and packs a window of items, of about as many as a step has: what workers run.

    Items are sorted by size and dealt to the windows in turn. Windows are then alike, and rows of
    one shape, which is compiled once, hold any of them with little room left over.
    """

    def __init__(self, loader: Loader, index: Index):
        plan = loader.plan
        self.loader = loader
        counts = np.diff(index.start)
        self.query = np.repeat(np.arange(index.queries), counts[: index.queries])
        self.candidate = np.flatnonzero(counts[index.queries :])
        wording = np.arange(len(self.query)) - index.start[self.query]
        self.prompt = np.where(plan.prompts(self.query) > 0, wording, -1)
        sizes = plan.query_sizes(self.query, self.prompt), plan.candidate_sizes(self.candidate)
        self.lengths, self.patches = (np.concatenate(both) for both in zip(*sizes, strict=True))
        self.count = -(-len(index) // (2 * plan.config.batch))
        self._order = np.lexsort((self.lengths, self.patches))
        self._shape = self._fitting_shape()

    def items(self, number: int) -> Int[ndarray, "items"]:
        """Return the numbers of the items in a window."""
        return self._order[number :: self.count]

    def checksum(self) -> str:
        """Return what other items would hardly have."""
        digest = hashlib.sha256()
        for column in (self.query, self.prompt, self.candidate, self.lengths, self.patches):
            digest.update(column.astype(np.int64).tobytes())
        return digest.hexdigest()

    def __call__(self, number: int) -> _Window:
        """Return a window, read and packed."""
        items = self.items(number)
        placement = place(self.lengths[items], self.patches[items], self._shape)
        vision = self.loader.plan.template.config.vision
        return _Window(
            rows=fill([*map(self._read, items.tolist())], placement, self._shape, vision),
            item=items,
            slot=placement.chunk * self._shape.slots + placement.slot,
        )

    def _read(self, number: int) -> Item:
        # An image that cannot be decoded is blank here too; its pair will not count.
        size = int(self.lengths[number]), int(self.patches[number])
        if number < len(self.query):
            row, prompt = int(self.query[number]), int(self.prompt[number])
            return self.loader.query(row, prompt, size)[0]
        return self.loader.candidate(int(self.candidate[number - len(self.query)]), size)[0]

    def _fitting_shape(self) -> RowShape:
        """Return a shape for as many chunks as a step has, tight for the fullest windows."""
        sizes = self.lengths, self.patches
        window = np.arange(len(self._order)) % self.count
        fullest = {int(np.bincount(window, of[self._order]).argmax()) for of in sizes}
        return batch_shape(
            [tuple(of[self.items(number)] for of in sizes) for number in sorted(fullest)],
            self.loader.chunks,
            self.loader.shape.groups,
            (int(self.lengths.max()), int(self.patches.max())),
        )


def _checksum(fixed: Fixed) -> int:
    """Return the sum of all bits of the teacher's weights, in words, modulo 2³².

    It is the same however leaves are split between teacher and student and over devices.
    """

    def words(leaf: Array) -> Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32).sum()

    return int(jax.jit(lambda tree: sum(map(words, jax.tree.leaves(tree))))(fixed))


def _claim(folder: Path, about: dict[str, Any], shape: tuple[int, int]) -> int:
    """Make a folder that of this cache, or check that it is; return how many windows are done."""
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
    """Make the file of states, with all of its room: a full disk would kill whoever maps it."""
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
    """Write down what a folder holds, and how much of it."""
    write_json(folder / _ABOUT_FILE, {**about, "done": done})
