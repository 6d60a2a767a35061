"""The mesh of devices, and how a batch is sharded over it.

Items are independent until the loss, so rows are sharded over two of the three axes: "data", whose
devices hold the same weights, and "fsdp", whose devices share them out. Devices along "tensor" work
on the same rows, each on its own heads and hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from puma_jax.axes import BATCH_AXES, MESH_AXES
from puma_jax.errors import ConfigError


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; one of the three may be -1, for all devices left."""

    data: int = -1
    """Copies of the weights, each with its own part of the batch; -1 takes all devices left."""
    fsdp: int = 1
    """Devices that share out the weights of one copy, each with its own part of the batch; 1 by
    default."""
    tensor: int = 1
    """Devices that share out heads and hidden units, all with the same part of the batch; 1 by
    default."""

    def __post_init__(self) -> None:
        """Check what holds for any number of devices."""
        sizes = astuple(self)
        if any(size < 1 and size != -1 for size in sizes):
            raise ConfigError(f"{self}: every axis must be at least 1, or -1 for all devices left")
        if sizes.count(-1) > 1:
            raise ConfigError(f"{self}: only one axis can be -1, for all devices left")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of axes `MESH_AXES`, all of type `AxisType.Auto`.

    Args:
        config: Number of devices along each axis.
        devices: Devices to arrange; None takes all devices of all hosts.

    Raises:
        ConfigError: The axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = astuple(config)
    given = math.prod(size for size in sizes if size != -1)
    left, remainder = divmod(len(devices), given)
    if remainder or (left != 1 and -1 not in sizes):
        raise ConfigError(f"{config} does not multiply to the {len(devices)} devices there are")
    return jax.make_mesh(
        tuple(left if size == -1 else size for size in sizes),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def data_shards(mesh: Mesh) -> int:
    """Return the number of data-parallel devices: the `data_shards` of a `PackedShape`."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array whose given axis counts rows, slots or items.

    It is axis 0 in one chunk of rows and axis 1 in several, `[chunks, rows, ...]`.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
