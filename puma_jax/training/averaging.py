"""The checkpoints of a stage as weights that can be averaged, without its data and its optimizer.

Adapters are merged into the kernels of each step, so that the mean is that of the models: a mean of
products A·B is not the product of means.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from puma_jax.config import DType, ModelConfig, require
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.model import hf
from puma_jax.model.peft import open_adapted
from puma_jax.training.checkpoint import intact_steps, read_trained, trained_shapes
from puma_jax.training.stages import kept_layers, param_dtype, student_config, with_inputs
from puma_jax.training.workdir import model_digest, read_run
from puma_jax.typing import ndarray


class StepWeights:
    """The weights of a stage's model at one step. Implements `averaging.Source`.

    Memory holds one trained leaf, or the A and B of one kernel.
    """

    def __init__(self, folder: Path, base: hf.Checkpoint, layers: Sequence[int], scale: float):
        """Open a checkpoint.

        Args:
            folder: Folder of the step.
            base: Model that the stage starts from.
            layers: Decoder layers of it that the stage keeps.
            scale: Factor on A·B of adapters.

        Raises:
            CheckpointError: The step cannot be read.
        """
        self._base, self._layers, self._scale = base, tuple(layers), np.float32(scale)
        self._shapes = trained_shapes(folder)
        # All layers of a leaf are asked for one after the other.
        self._trained = functools.lru_cache(2)(
            lambda name: read_trained(folder, name, self._shapes[name])
        )

    def read_part(self, name: str, index: tuple[slice, ...], leaf: jax.ShapeDtypeStruct) -> ndarray:
        """Return `leaf[index]`, with the adapter of this step merged."""
        if name in self._shapes:
            return self._trained(name)[index]
        part = self._base.read_part(name, index, leaf, self._layers)
        a, b = (f"{name.removesuffix('kernel')}lora_{side}" for side in "ab")
        if a not in self._shapes:
            return part
        *stack, inputs, outputs = index
        of_a = self._trained(a)[(*stack, inputs)]
        of_b = self._trained(b)[(*stack, slice(None), outputs)]
        return part + self._scale * (of_a @ of_b)


@dataclass(frozen=True)
class StageSteps:
    """Checkpoints of one stage, and the model that they are of."""

    config: ModelConfig
    base: hf.Checkpoint
    """Model that the stage starts from."""
    dtype: DType
    """Dtype in which the stage reads its base."""
    steps: tuple[int, ...]
    weights: tuple[StepWeights, ...]
    """Weights of each step."""


def open_steps(
    workdir: Path, name: str, *, last: int | None = None, steps: Sequence[int] = ()
) -> StageSteps:
    """Open checkpoints of a stage: the last ones, or those of some steps.

    Args:
        workdir: Folder of the run.
        name: Name of the stage.
        last: Number of checkpoints; None for all.
        steps: Steps to open, in place of the last ones.

    Raises:
        ArtifactError: The folder holds no run.
        CheckpointError: A checkpoint is missing or damaged, or the model that the stage starts from
            is not the one that it started from.
        ConfigError: The run has no such stage, or the stage trains all weights of an adapted model.
    """
    run = read_run(workdir)
    if name not in run.stages:
        raise ConfigError(f'{workdir} has no stage "{name}", only {", ".join(run.stages)}')
    folder = workdir / "checkpoints" / name
    found, damaged = intact_steps(folder)
    chosen = tuple(sorted(set(steps))) or tuple(found)[-(last or len(found)) :]
    missing = [str(step) for step in chosen if step not in found]
    if missing or len(chosen) < max(2, last or 0):
        there = ", ".join(map(str, found)) or "none"
        also = "".join(f"; {one}" for one in damaged)
        raise CheckpointError(
            f"{folder} has checkpoints of steps {there}{also}; asked for "
            f"{', '.join(map(str, chosen)) if steps else f'the last {last or 2}'}: keep more with "
            "checkpoint.max_to_keep, and those of finished stages with checkpoint.keep_finished"
        )
    stage = run.stages[name]
    names = list(run.stages)
    before = names[names.index(name) - 1] if name != names[0] else "base"
    base, adapter = open_adapted(stage.model or workdir / before, stage.adapter)
    digest, expected = model_digest(base.folder), str(found[chosen[-1]].get("base"))
    if digest != expected:
        raise CheckpointError(
            f"{base.folder} is not the model that the checkpoints in {folder} start from: its "
            f"files have digest {digest[:12]}, expected {expected[:12]}"
        )
    lora = stage.lora
    if adapter is not None:
        require(stage.trains_lora, f"stage {name} trains all weights of a model with an adapter")
        lora = adapter.lora_config(lora.dropout)
    config = with_inputs(base.config, run)
    layers = kept_layers(stage, config.decoder.layers)
    weights = tuple(
        StepWeights(folder / str(step), base, layers, lora.alpha / lora.rank) for step in chosen
    )
    dtype = param_dtype(stage, run.compute)
    return StageSteps(student_config(stage, config), base, dtype, chosen, weights)
