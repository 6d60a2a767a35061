"""The arrangement of devices, and how a batch is spread over it.

Items never see each other until the loss, so rows are spread over two of the three axes: "data",
whose devices hold the same weights, and "fsdp", whose devices share them out. The devices along
"tensor" work on the same rows, each on its own heads and hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from puma_jax.errors import ConfigError
from puma_jax.model.attention import HEAD_AXIS, ROW_AXES

BATCH_AXES = ROW_AXES
"""Rows, items and the loss are spread over both."""
AXES = (*BATCH_AXES, HEAD_AXIS)


@dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each axis; one of the three may be −1: what is left."""

    data: int = -1
    """Parts of the batch whose devices hold whole copies of the weights."""
    fsdp: int = 1
    """Devices that share out the weights of one copy, each with its own part of the batch."""
    tensor: int = 1
    """Devices that share out heads and hidden units, all with the same part of the batch."""

    def __post_init__(self) -> None:
        """Check what is wrong for any number of devices."""
        sizes = astuple(self)
        if any(size < 1 and size != -1 for size in sizes):
            raise ConfigError(f"{self}: every axis must be at least 1, or -1 for what is left")
        if sizes.count(-1) > 1:
            raise ConfigError(f"{self}: only one axis can be -1, what is left")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of axes `AXES`, all of them left to the compiler (`AxisType.Auto`).

    Args:
        config: Devices along each axis.
        devices: What to arrange; None takes all there are, of every host.

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
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )


def groups(mesh: Mesh) -> int:
    """Return into how many parts a batch divides: the `groups` of a `RowShape` for this mesh."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array whose axis of this number counts rows, slots or items.

    Axis 0 is that of one chunk of rows, axis 1 that of several, `[chunks, rows, ...]`.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
