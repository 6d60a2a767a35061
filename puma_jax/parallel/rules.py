"""Which part of every weight each device holds: one ordered table, and no leaf without a rule.

A linear whose outputs are heads or hidden units is split over "tensor" by its outputs, the linear
that reads them by its inputs, so that one sum after the second is all they exchange. The axis that
"tensor" leaves over is split over "fsdp". Adapters follow their kernel, the state of an optimizer
the leaf it belongs to, which its name ends in.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from puma_jax.config import ModelConfig
from puma_jax.errors import ConfigError
from puma_jax.model import encoder
from puma_jax.model.encoder import Encoder
from puma_jax.model.tree import map_named
from puma_jax.parallel.mesh import replicated
from puma_jax.typing import PRNGKeyArray

_SPLIT_OUTPUTS = r"decoder\.layers\.(attention\.(query|key|value)|mlp\.(gate|up))\."
_SPLIT_INPUTS = r"decoder\.layers\.(attention\.out|mlp\.down)\."
_KEY_OR_VALUE = r"decoder\.layers\.attention\.(key|value)\."

# What the end of a leaf's name matches → its axes; the first that matches counts. Stacked leaves
# start with their axis of layers, which is never split: the scan over it would gather every layer.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"decoder\.embedding\.table", PartitionSpec(None, ("fsdp", "tensor"))),
    (_SPLIT_OUTPUTS + "kernel", PartitionSpec(None, "fsdp", "tensor")),
    (_SPLIT_OUTPUTS + "bias", PartitionSpec(None, "tensor")),
    (_SPLIT_OUTPUTS + "lora_a", PartitionSpec(None, "fsdp", None)),
    (_SPLIT_OUTPUTS + "lora_b", PartitionSpec(None, None, "tensor")),
    (_SPLIT_INPUTS + "kernel", PartitionSpec(None, "tensor", "fsdp")),
    (_SPLIT_INPUTS + "lora_a", PartitionSpec(None, "tensor", None)),
    (_SPLIT_INPUTS + "lora_b", PartitionSpec(None, None, "fsdp")),
    (r"vision\.patch_embedding\.projection\.kernel", PartitionSpec(None, "fsdp")),
    # Query, key and value are one matrix: a split of its outputs would not fall between heads.
    (r"vision\.blocks\.attention\.qkv\.kernel", PartitionSpec(None, "fsdp", None)),
    (r"vision\.blocks\.attention\.out\.kernel", PartitionSpec(None, None, "fsdp")),
    (r"vision\.blocks\.attention\.(qkv|out)\.bias", PartitionSpec()),
    (r"vision\.blocks\.up\.kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"vision\.blocks\.up\.bias", PartitionSpec(None, "tensor")),
    (r"vision\.blocks\.down\.kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"vision\.merger\.up\.kernel", PartitionSpec("fsdp", "tensor")),
    (r"vision\.merger\.up\.bias", PartitionSpec("tensor")),
    (r"vision\.merger\.down\.kernel", PartitionSpec("tensor", "fsdp")),
    (r"vision\.(blocks|merger)\.down\.bias", PartitionSpec()),
    (r"(attention_|mlp_)?norm\.(scale|bias)", PartitionSpec()),
)


def sharding_of(name: str, leaf: Any, mesh: Mesh, config: ModelConfig) -> NamedSharding:
    """Return where a leaf of a model, of its adapters or of an optimizer's state lives.

    Keys and values are split over "tensor" if its devices divide the key and value heads, and
    are otherwise held whole by all of them. Scalars need no rule.

    Args:
        name: Of the leaf, see `tree.leaf_name`.
        leaf: An array, or anything else that has a shape.
        mesh: From `make_mesh`.
        config: Of the model.

    Raises:
        ConfigError: No rule matches the name, or the rule does not fit the shape and the mesh.
    """
    shape, tensor = tuple(leaf.shape), mesh.shape["tensor"]
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
        spec = PartitionSpec(*(None if axis == "tensor" else axis for axis in spec))
    _check_that_it_fits(spec, name, shape, mesh)
    return NamedSharding(mesh, spec)


def placement(mesh: Mesh, config: ModelConfig) -> Callable[[str, Any], NamedSharding]:
    """Return `sharding_of` for one mesh and model: what `Checkpoint.read` asks for each leaf."""
    return functools.partial(sharding_of, mesh=mesh, config=config)


def shardings(tree: Any, mesh: Mesh, config: ModelConfig) -> Any:
    """Return the tree of the sharding of every leaf, see `sharding_of`."""
    return map_named(placement(mesh, config), tree)


def init_sharded(config: ModelConfig, key: PRNGKeyArray, dtype: str, mesh: Mesh) -> Encoder:
    """Return a model with random weights that come into being where they live.

    No device ever holds more than its part. The numbers are those of `encoder.init` under
    `jax.jit` on one device.
    """

    def init(key: PRNGKeyArray) -> Encoder:
        return encoder.init(config, key, dtype)

    where = shardings(encoder.abstract(config, dtype), mesh, config)
    return jax.jit(init, out_shardings=where)(key)


def _ends_in(pattern: str, name: str) -> bool:
    """Whether the last parts of a dotted name match."""
    return re.search(rf"(^|\.)({pattern})$", name) is not None


def _check_that_it_fits(spec: PartitionSpec, name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    what = f"{name} {shape} on the mesh " + ", ".join(
        f"{axis}={size}" for axis, size in mesh.shape.items()
    )
    if len(spec) > len(shape):
        raise ConfigError(f"{what}: its rule {spec} is for more axes")
    split = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
    used = list(itertools.chain(*split))
    if len(set(used)) < len(used):
        raise ConfigError(f"{what}: its rule {spec} uses an axis of the mesh twice")
    for number, axes in enumerate(split):
        if shape[number] % math.prod(mesh.shape[axis] for axis in axes):
            raise ConfigError(f"{what}: axis {number} does not divide over {' × '.join(axes)}")
