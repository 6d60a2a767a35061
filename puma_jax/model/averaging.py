"""The weighted mean of models that have the same shape, read and averaged one tensor at a time.

Models that were trained from one base, on other data, in another order or for another number of
steps, often do better as their mean than each alone ("model soups", arXiv 2203.05482).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from puma_jax.artifacts import differences
from puma_jax.config import DType, ModelConfig, require
from puma_jax.errors import CheckpointError
from puma_jax.model import encoder, hf
from puma_jax.model.encoder import Encoder
from puma_jax.model.tree import map_named
from puma_jax.schema import shown
from puma_jax.typing import ndarray

_ROWS_AT_ONCE = 4096
_TRAINED_FOR = ("widths", "exit_layers")
"""Fields that say what a model was trained for; its vectors do not depend on them."""


@runtime_checkable
class Source(Protocol):
    """Weights that are read in parts."""

    def read_part(self, name: str, index: tuple[slice, ...], leaf: jax.ShapeDtypeStruct) -> ndarray:
        """Return `leaf[index]` of the leaf of this name; see `hf.Checkpoint.read_part`."""
        ...


def mean_config(configs: Sequence[ModelConfig], names: Sequence[str]) -> ModelConfig:
    """Return the config of the mean: the one that all have, with the widths and exits of all.

    Args:
        configs: Config of each model.
        names: What a message calls each model.

    Raises:
        CheckpointError: Two of them differ in shape, prompt, image limits or kept layers.
    """
    first = asdict(configs[0])
    for name, config in zip(names, configs, strict=True):
        for field, there, here in differences(asdict(config), first):
            if field not in _TRAINED_FOR:
                raise CheckpointError(
                    f"{name} differs from {names[0]} in {field} ({shown(there)} there, "
                    f"{shown(here)} here): only models that are alike have a mean"
                )
    shared: dict[str, Any] = {}
    for field in _TRAINED_FOR:
        of_models = [{*getattr(config, field)} for config in configs]
        shared[field] = tuple(sorted(set.intersection(*of_models)))
    return replace(configs[0], **shared)


def left_out(configs: Sequence[ModelConfig], merged: ModelConfig) -> list[str]:
    """Return a line for each field with something that not all models were trained for."""
    lines = []
    for field in _TRAINED_FOR:
        found = {value for config in configs for value in getattr(config, field)}
        if dropped := sorted(found - {*getattr(merged, field)}):
            listed = ", ".join(map(str, dropped))
            lines.append(f"{field} {listed}: left out, as not all models were trained for them")
    return lines


def scaled(weights: Sequence[float], models: int) -> tuple[float, ...]:
    """Return weights that add up to 1, all equal if none are given.

    Raises:
        ConfigError: There is not one weight above 0 for each model.
    """
    weights = weights or (1.0,) * models
    require(
        len(weights) == models and all(0 < one < math.inf for one in weights),
        f"weights {' '.join(map(str, weights))} must be {models} numbers above 0, one for each "
        "model",
    )
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def mean(
    config: ModelConfig, sources: Sequence[Source], weights: Sequence[float], dtype: DType
) -> Encoder:
    """Return a model whose leaves are means, summed in float64 when they are read.

    Every leaf holds no values. It gives those of a layer, or all if it has no layers, and memory
    holds them and a block of rows in float64. `hf.write_checkpoint` takes such a model.

    Args:
        config: Config of all of them.
        sources: The weights of each.
        weights: Weight of each, which add up to 1.
        dtype: Dtype of the result.
    """

    def leaf_of(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
        return _Mean(name, leaf.shape, np.dtype(leaf.dtype), tuple(sources), tuple(weights))

    return map_named(leaf_of, encoder.abstract(config, dtype))


@dataclass(frozen=True, eq=False)
class _Mean:
    """A leaf that is computed when it is asked for, as a whole or a layer of it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, layer: int) -> ndarray:
        return self._compute((slice(layer, layer + 1),), self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> ndarray:
        return self._compute((), self.shape).astype(dtype or self.dtype, copy=False)

    def _compute(self, layer: tuple[slice, ...], shape: tuple[int, ...]) -> ndarray:
        """Return the mean of the part `layer` of the leaf, of this shape."""
        result = np.empty(shape, self.dtype)
        leaf = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        others = (slice(None),) * (len(shape) - 1)
        for start in range(0, shape[0], _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, shape[0]))
            total = np.zeros((rows.stop - rows.start, *shape[1:]))
            for source, weight in zip(self.sources, self.weights, strict=True):
                part = source.read_part(self.name, (*layer, rows, *others), leaf)
                total += weight * part.reshape(total.shape).astype(np.float64)
            result[rows] = hf.cast(total, self.dtype)
        return result
