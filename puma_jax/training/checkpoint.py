"""Checkpoints of a stage's state with Orbax: written atomically, while training continues."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from puma_jax.errors import CheckpointError
from puma_jax.model.tree import named_leaves
from puma_jax.training.step import TrainState

_PACKAGES = ("puma-jax", "jax", "flax", "optax", "orbax-checkpoint")


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, folder: Path, *, max_to_keep: int, about: Mapping[str, Any]):
        """Open a folder, and remove the unfinished checkpoint of a killed run.

        Args:
            folder: Folder for this stage alone.
            max_to_keep: How many of the latest to keep.
            about: Description of the run, JSON; a state with another description is refused.
        """
        self.folder = folder.resolve()
        self._about = dict(about)
        self._pending: Any = None
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(max_to_keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint; None if there is none."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, state: TrainState) -> None:
        """Start to write a state in the background, once the state before it is on disk.

        Raises:
            CheckpointError: The state before it could not be written.
        """
        self.wait()
        step = int(state.step)
        if step != self.latest:
            about = {**self._about, "versions": versions()}
            self._pending = self._checkpointer.save_async(step, state, custom_metadata=about)

    def wait(self) -> None:
        """Wait until the last saved state is on disk.

        Raises:
            CheckpointError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:  # Orbax raises errors of many kinds
                reason = str(error).splitlines()[0]
                raise CheckpointError(f"{self.folder} cannot be written: {reason}") from error

    def restore(self, like: TrainState) -> TrainState:
        """Return the latest state, with the shapes, dtypes and shardings of `like`.

        Raises:
            CheckpointError: The checkpoint cannot be read, or is that of another model or stage.
        """
        step = self.latest
        found = self._checkpointer.metadata(step).custom_metadata or {}
        for name, value in self._about.items():
            if found.get(name) != value:
                raise CheckpointError(
                    f"{self.folder} holds a run with {name} {found.get(name)}, this one has "
                    f"{value}: choose another --workdir, or delete this one"
                )
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        try:
            state = self._checkpointer.load(step, abstract)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self.folder}, step {step}, cannot be read: {reason}"
            ) from error
        # Orbax reads a tree with fewer leaves, or truncated leaves, without an error.
        _require_same(named_leaves(state), named_leaves(like), self.folder)
        return state

    def close(self) -> None:
        """Wait until the last saved state is on disk, and close the folder."""
        self.wait()
        self._checkpointer.close()


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the results of a run."""
    return {package: importlib.metadata.version(package) for package in _PACKAGES}


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
