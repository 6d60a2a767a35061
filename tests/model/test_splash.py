"""The splash kernel, interpreted on CPUs, against XLA's attention: forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from puma_jax.model import attention, kernels, splash
from puma_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch):
    monkeypatch.setattr(splash, "splash", functools.partial(splash.splash, interpret=True))
    monkeypatch.setattr(kernels, "check", lambda name, target: None)


def inputs(rows, length, heads, kv_heads, dim):
    """Queries, keys, values, a cotangent; rows of two items and one short item, then padding."""
    rng = np.random.default_rng(0)
    shapes = [(rows, length, of, dim) for of in (heads, kv_heads, kv_heads, heads)]
    segments = np.zeros((rows, length), np.int32)
    segments[::2, : length // 3] = 1
    segments[::2, length // 3 : length // 2 + 9] = 2
    segments[1::2, :7] = 1
    return [jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes], segments


def outputs_and_gradients(arrays, segments, causal, implementation):
    @jax.jit
    def both(q, k, v, cotangent, segments):
        attend = functools.partial(
            attention.attention, segment_ids=segments, causal=causal, implementation=implementation
        )
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    return jax.device_get(both(*arrays, segments))


# As in the decoder, as in one that attends both ways, and a length that one block does not cover.
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim", "causal"),
    [(256, 4, 2, 128, True), (128, 4, 2, 80, False), (1024, 2, 1, 16, True)],
)
def test_splash_is_attention_and_so_are_its_gradients(length, heads, kv_heads, dim, causal):
    arrays, segments = inputs(2, length, heads, kv_heads, dim)
    expected = outputs_and_gradients(arrays, segments, causal, "xla")
    found = outputs_and_gradients(arrays, segments, causal, "splash")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


# Four devices on heads: more than there are heads of keys, which are then repeated.
@pytest.mark.parametrize(("axes", "kv_heads"), [((2, 2, 2), 2), ((1, 2, 4), 2), ((8, 1, 1), 1)])
def test_devices_take_their_own_rows_and_heads(axes, kv_heads):
    arrays, segments = inputs(8, 128, 4, kv_heads, 16)
    expected = outputs_and_gradients(arrays, segments, True, "xla")
    by_rows = batch_sharding(make_mesh(MeshConfig(*axes)))
    spread = jax.device_put((arrays, segments), by_rows)
    found = outputs_and_gradients(*spread, True, "splash")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_rows_that_devices_do_not_divide_are_computed_by_all():
    arrays, segments = inputs(3, 128, 2, 2, 16)
    expected = outputs_and_gradients(arrays, segments, True, "xla")
    everywhere = NamedSharding(make_mesh(MeshConfig(data=8)), P())
    found = outputs_and_gradients(jax.device_put(arrays, everywhere), segments, True, "splash")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
