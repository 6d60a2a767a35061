"""Devices in three axes, and batches over two of them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from puma_jax.errors import ConfigError
from puma_jax.parallel.mesh import MeshConfig, batch_sharding, data_shards, make_mesh, replicated


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (MeshConfig(data=-1, fsdp=4, tensor=2), (1, 4, 2)),
    ],
)
def test_one_axis_takes_what_is_left(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.devices.shape == sizes
    assert {device.id for device in mesh.devices.flat} == set(range(8))
    assert data_shards(mesh) == sizes[0] * sizes[1]


def test_a_mesh_of_some_devices():
    assert make_mesh(MeshConfig(tensor=2), jax.devices()[2:6]).devices.shape == (2, 1, 2)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (-1, 3, 1), (4, 4, 1), (-1, 16, 1), (2, 2, 4)])
def test_a_mesh_takes_every_device_once(sizes):
    with pytest.raises(ConfigError, match=r"^MeshConfig\(.*\) does not multiply to the 8 devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (-1, 1, -1), (0, 1, 1), (-2, 1, 1)])
def test_sizes_that_fit_no_number_of_devices(sizes):
    with pytest.raises(ConfigError, match=r"^MeshConfig\(.*(only one axis|at least 1)"):
        MeshConfig(*sizes)


def test_a_batch_is_split_by_data_shards_in_order():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(24).reshape(8, 3)
    split = jax.device_put(rows, batch_sharding(mesh))
    chunks = jax.device_put(np.stack([rows, rows]), batch_sharding(mesh, 1))
    for shard in split.addressable_shards:
        group = np.argwhere(mesh.devices == shard.device)[0][:2] @ [2, 1]
        np.testing.assert_array_equal(shard.data, rows[2 * group : 2 * group + 2])
    assert {shard.data.shape for shard in chunks.addressable_shards} == {(2, 2, 3)}
    whole = jax.device_put(rows, replicated(mesh))
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8, 3)}
