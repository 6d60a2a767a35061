"""Checkpoints of a stage's state with Orbax: written whole, while training continues.

```
{step}/        what Orbax writes
{step}.json    the stage's settings and the digest of every file, written once the step is on disk
```
A step is used if all of its files are as they were written. A step without its digests was never
finished.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from puma_jax.artifacts import differences, sync, write_json, writing
from puma_jax.errors import CheckpointError
from puma_jax.files import read_object, sha256, sha256_of
from puma_jax.model.tree import named_leaves
from puma_jax.parallel import multihost
from puma_jax.schema import shown
from puma_jax.training.step import TrainState
from puma_jax.typing import ndarray

_PACKAGES = ("puma-jax", "jax", "flax", "optax", "orbax-checkpoint")


@dataclass(frozen=True)
class _Record:
    """The content of {step}.json."""

    about: dict[str, Any]
    """The settings and data that the state belongs to."""
    versions: dict[str, str]
    files: dict[str, str]
    """SHA-256 of every file, by its path in the folder of the step."""
    digest: str = ""
    """SHA-256 of all of the above."""

    def complete(self) -> _Record:
        """Return the record with its digest."""
        fields = {name: value for name, value in asdict(self).items() if name != "digest"}
        return _Record(**fields, digest=sha256_of(fields))


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, folder: Path, *, max_to_keep: int, about: Mapping[str, Any]):
        """Open a folder, and choose the latest step that is intact.

        Steps after it, which are damaged or were never finished, are removed, and named in a line.

        Args:
            folder: Folder for this stage alone.
            max_to_keep: How many of the latest to keep.
            about: What the state is of, JSON; a state of something else is refused.

        Raises:
            CheckpointError: No step is intact, or a step is of something else.
        """
        self.folder = folder.resolve()
        self._about = dict(about)
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: int | None = multihost.from_process_zero(self._choose)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(max_to_keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint; None if there is none."""
        return self._last

    def save(self, state: TrainState) -> None:
        """Start to write a state in the background, once the state before it is on disk.

        Raises:
            CheckpointError: The state before it could not be written.
        """
        self.wait()
        step = int(state.step)
        if step != self._last:
            pending = self._checkpointer.save_async(step, state)
            self._writing = self._thread.submit(self._finish, step, pending)
            self._last = step

    def wait(self) -> None:
        """Wait until the last saved state is on disk, to survive a power failure.

        Raises:
            CheckpointError: It could not be written.
        """
        pending, self._writing = self._writing, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:  # Orbax raises errors of many kinds
                reason = (str(error) or repr(error)).splitlines()[0]
                raise CheckpointError(f"{self.folder} cannot be written: {reason}") from error

    def restore(self, like: TrainState) -> TrainState:
        """Return the latest state, with the shapes, dtypes and shardings of `like`.

        Raises:
            CheckpointError: The checkpoint cannot be read, or is that of another model.
        """
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        try:
            state = self._checkpointer.load(self._last, abstract)
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise CheckpointError(
                f"{self.folder}, step {self._last}, cannot be read: {reason}"
            ) from error
        # Orbax reads a tree with fewer leaves, or truncated leaves, without an error.
        _require_same(named_leaves(state), named_leaves(like), self.folder)
        return state

    def close(self) -> None:
        """Wait until the last saved state is on disk, and close the folder."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def _finish(self, step: int, pending: Any) -> None:
        """Wait for a step, then write its digests, and remove those of steps that are gone."""
        pending.result()
        if not multihost.is_process_zero():
            return
        folder = self.folder / str(step)
        sync(folder)
        record = _Record(self._about, versions(), _digests(folder)).complete()
        write_json(_record_path(folder), asdict(record))
        for path in self.folder.glob("*.json"):
            if not path.with_suffix("").exists():
                path.unlink(missing_ok=True)

    def _choose(self) -> int | None:
        """Return the latest intact step, and remove those after it."""
        found = _step_folders(self.folder)
        dropped: list[tuple[Path, str]] = []
        while found and (reason := self._damage(found[-1])):
            dropped.append((found.pop(), reason))
        finished = [path for path, _ in dropped if _record_path(path).exists()]
        if finished and not found:
            raise CheckpointError(
                f"{self.folder}: no step is intact ({_listed(dropped)}): delete the folder to "
                "train the stage from its start"
            )
        if dropped:
            where = f"resumes from step {found[-1].name}" if found else "begins at the start"
            print(f"{self.folder}: {_listed(dropped)}; removed, training {where}", flush=True)
        with writing(self.folder, error=CheckpointError):
            for path, _ in dropped:
                shutil.rmtree(path)
                _record_path(path).unlink(missing_ok=True)
        return int(found[-1].name) if found else None

    def _damage(self, folder: Path) -> str | None:
        """Return what is wrong with a step; None if nothing is.

        Raises:
            CheckpointError: It is intact, and of something else.
        """
        about = _read_about(folder)
        if isinstance(about, str):
            return about
        for name, there, here in differences(about, self._about):
            raise CheckpointError(
                f"{folder} is a checkpoint of another job, which differs in {name} "
                f"({shown(there)} there, {shown(here)} here): choose another --workdir, or delete "
                "this folder"
            )
        return None


def intact_steps(folder: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Return what each intact step is of, in ascending order, and what is wrong with the others.

    Nothing is removed.
    """
    found: dict[int, dict[str, Any]] = {}
    damaged: list[tuple[Path, str]] = []
    for path in _step_folders(folder):
        about = _read_about(path)
        if isinstance(about, str):
            damaged.append((path, about))
        else:
            found[int(path.name)] = about
    return found, [_listed([one]) for one in damaged]


def trained_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trained leaf of a step, by name.

    Raises:
        CheckpointError: The step cannot be read.
    """
    with _reading(folder):
        trained = ocp.metadata(folder).metadata["trained"]
    return {name: tuple(leaf.shape) for name, leaf in trained.items()}


def read_trained(folder: Path, name: str, shape: tuple[int, ...]) -> ndarray:
    """Return one trained leaf of a step, float32; nothing else is read.

    Raises:
        CheckpointError: The step cannot be read.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct(shape, np.float32, sharding=device)
    loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
    options = ocp.options.PyTreeOptions(loading=loading)
    with _reading(folder), ocp.Context(pytree_options=options):
        return np.asarray(ocp.load(folder, {"trained": {name: leaf}})["trained"][name])


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn errors of Orbax, which are of many kinds, into one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"{folder} cannot be read: {reason}") from error


def _step_folders(folder: Path) -> list[Path]:
    """Return the folders of all steps, finished or not, in ascending order."""
    found = (path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def _read_about(folder: Path) -> dict[str, Any] | str:
    """Return what an intact step is of, or what is wrong with the step."""
    path = _record_path(folder)
    if not path.exists():
        return "was not finished"
    try:
        record = read_object(path, _Record, error=CheckpointError)
        if record != record.complete():
            return f"is damaged ({path.name})"
        digests = _digests(folder)
    except CheckpointError:
        return f"is damaged ({path.name})"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    for name in sorted({*record.files, *digests}):
        if record.files.get(name) != digests.get(name):
            return f"is damaged ({name})"
    return record.about


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the results of a run.

    A package that runs from its source tree, without being installed, has the version "source".
    """
    return {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _record_path(folder: Path) -> Path:
    """Return the path of the digests of a step, beside its folder."""
    return folder.with_name(f"{folder.name}.json")


def _listed(dropped: list[tuple[Path, str]]) -> str:
    return ", ".join(f"step {path.name} {reason}" for path, reason in dropped)


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for name, leaf in wanted.items():
        if name not in found:
            raise CheckpointError(
                f"{folder} lacks {name}: choose another --workdir, or delete this one"
            )
        if found[name].shape != leaf.shape or found[name].dtype != leaf.dtype:
            raise CheckpointError(
                f"{folder}: {name} is {found[name].dtype}{list(found[name].shape)}, "
                f"expected {leaf.dtype}{list(leaf.shape)}"
            )
