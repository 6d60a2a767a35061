"""Shardings of all weights: one ordered table of rules, which every leaf has to match.

A linear whose outputs are heads or hidden units is split over "tensor" by its outputs, and the
linear that reads them by its inputs, so that the devices exchange one sum after the second. The
other axis is split over "fsdp". Adapters follow their kernel. The state of an optimizer follows the
leaf it belongs to, whose name its own name ends in.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from puma_jax.axes import FSDP_AXIS, TENSOR_AXIS
from puma_jax.config import ModelConfig
from puma_jax.errors import ConfigError
from puma_jax.model.tree import map_named
from puma_jax.parallel.mesh import replicated

_SPLIT_OUTPUTS = r"decoder\.layers\.(attention\.(query|key|value)|mlp\.(gate|up))\."
_SPLIT_INPUTS = r"decoder\.layers\.(attention\.out|mlp\.down)\."
_KEY_OR_VALUE = r"decoder\.layers\.attention\.(key|value)\."
_TOWER_STACK = r"vision\.(blocks|deepstack)\."

# Pattern for the end of a leaf's name → mesh axes of its dimensions; the first match counts.
# Stacked leaves start with an axis of layers, which is never split: the scan over it would gather
# every layer.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"decoder\.embedding\.table", PartitionSpec(None, (FSDP_AXIS, TENSOR_AXIS))),
    (_SPLIT_OUTPUTS + "kernel", PartitionSpec(None, FSDP_AXIS, TENSOR_AXIS)),
    (_SPLIT_OUTPUTS + "bias", PartitionSpec(None, TENSOR_AXIS)),
    (_SPLIT_OUTPUTS + "lora_a", PartitionSpec(None, FSDP_AXIS, None)),
    (_SPLIT_OUTPUTS + "lora_b", PartitionSpec(None, None, TENSOR_AXIS)),
    (_SPLIT_INPUTS + "kernel", PartitionSpec(None, TENSOR_AXIS, FSDP_AXIS)),
    (_SPLIT_INPUTS + "lora_a", PartitionSpec(None, TENSOR_AXIS, None)),
    (_SPLIT_INPUTS + "lora_b", PartitionSpec(None, None, FSDP_AXIS)),
    (r"vision\.patch_embedding\.projection\.kernel", PartitionSpec(None, FSDP_AXIS)),
    # Query, key and value are one matrix: a split of its outputs would not fall between heads.
    (r"vision\.blocks\.attention\.qkv\.kernel", PartitionSpec(None, FSDP_AXIS, None)),
    (r"vision\.blocks\.attention\.out\.kernel", PartitionSpec(None, None, FSDP_AXIS)),
    (r"vision\.blocks\.attention\.(qkv|out)\.bias", PartitionSpec()),
    (_TOWER_STACK + r"(gate|up)\.kernel", PartitionSpec(None, FSDP_AXIS, TENSOR_AXIS)),
    (_TOWER_STACK + r"(gate|up)\.bias", PartitionSpec(None, TENSOR_AXIS)),
    (_TOWER_STACK + r"down\.kernel", PartitionSpec(None, TENSOR_AXIS, FSDP_AXIS)),
    (r"vision\.merger\.up\.kernel", PartitionSpec(FSDP_AXIS, TENSOR_AXIS)),
    (r"vision\.merger\.up\.bias", PartitionSpec(TENSOR_AXIS)),
    (r"vision\.merger\.down\.kernel", PartitionSpec(TENSOR_AXIS, FSDP_AXIS)),
    (r"vision\.(blocks|merger|deepstack)\.down\.bias", PartitionSpec()),
    (r"vision\.patch_embedding\.projection\.bias", PartitionSpec()),
    (r"vision\.positions\.table", PartitionSpec(None, FSDP_AXIS)),
    # They are merged as soon as they are read.
    (r"vision\.[\w.]+\.lora_[ab]", PartitionSpec()),
    (r"((attention|mlp|query|key)_)?norm\.(scale|bias)", PartitionSpec()),
    (r"ns_coeffs", PartitionSpec()),  # in Muon's state
)


def sharding_of(name: str, leaf: Any, mesh: Mesh, config: ModelConfig) -> NamedSharding:
    """Return the sharding of a leaf of a model, of its adapters or of an optimizer's state.

    Key and value projections are split over "tensor" if the axis divides the key and value heads,
    and are replicated over it otherwise. Scalars are replicated.

    Args:
        name: Name of the leaf, see `tree.leaf_name`.
        leaf: An array, or anything else with a shape.
        mesh: Mesh of devices, from `make_mesh`.
        config: Configuration of the model.

    Raises:
        ConfigError: No rule matches the name, or the rule does not fit the shape and the mesh.
    """
    shape, tensor = tuple(leaf.shape), mesh.shape[TENSOR_AXIS]
    if config.decoder.heads % tensor:
        raise ConfigError(
            f"mesh axis tensor={tensor} does not divide the {config.decoder.heads} attention heads"
        )
    if not shape:
        return replicated(mesh)
    spec = next((spec for pattern, spec in RULES if _ends_in(pattern, name)), None)
    if spec is None:
        raise ConfigError(f"{name} {shape} has no rule in puma_jax.parallel.rules")
    if config.decoder.kv_heads % tensor and _ends_in(_KEY_OR_VALUE + r"\w+", name):
        spec = PartitionSpec(*(None if axis == TENSOR_AXIS else axis for axis in spec))
    _check_fits(spec, name, shape, mesh)
    return NamedSharding(mesh, spec)


def sharding_fn(mesh: Mesh, config: ModelConfig) -> Callable[[str, Any], NamedSharding]:
    """Return the function from name and leaf to sharding that `Checkpoint.read` takes."""
    return functools.partial(sharding_of, mesh=mesh, config=config)


def shardings(tree: Any, mesh: Mesh, config: ModelConfig) -> Any:
    """Return the tree of every leaf's sharding, see `sharding_of`."""
    return map_named(sharding_fn(mesh, config), tree)


def _ends_in(pattern: str, name: str) -> bool:
    """Return whether the last parts of a dotted name match."""
    return re.search(rf"(^|\.)({pattern})$", name) is not None


def _check_fits(spec: PartitionSpec, name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    leaf = f"{name} {shape} on the mesh " + ", ".join(
        f"{axis}={size}" for axis, size in mesh.shape.items()
    )
    if len(spec) > len(shape):
        raise ConfigError(f"{leaf}: its rule {spec} names {len(spec)} axes")
    split = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
    used = list(itertools.chain(*split))
    if len(set(used)) < len(used):
        raise ConfigError(f"{leaf}: its rule {spec} uses an axis of the mesh twice")
    for number, axes in enumerate(split):
        if shape[number] % math.prod(mesh.shape[axis] for axis in axes):
            raise ConfigError(f"{leaf}: axis {number} does not divide over {' × '.join(axes)}")
