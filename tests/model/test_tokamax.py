"""tokamax's mask of key ranges against XLA's attention: forward and backward, on CPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax.model import attention, kernels
from puma_jax.model.tokamax import key_ranges, tokamax
from puma_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from tests.model.test_splash import inputs, outputs_and_gradients

needs_tokamax = pytest.mark.skipif(
    kernels._tokamax() != kernels.TOKAMAX,
    reason=f"compares with tokamax {kernels.TOKAMAX}: Python 3.12, pip install -e '.[cuda]'",
)


@pytest.fixture
def on_cpus(monkeypatch):
    monkeypatch.setattr(kernels, "check", lambda name, target: None)

    def by_xla(*arrays, causal, kernel):
        assert kernel == "mosaic_gpu"
        return tokamax(*arrays, causal=causal, kernel="xla")

    monkeypatch.setattr(attention, "tokamax", by_xla)


def assert_equal_but_for_rounding(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_key_ranges_are_the_mask_of_segments(causal):
    rng = np.random.default_rng(0)
    segments = np.zeros((8, 33), np.int32)
    for row in segments[1:]:  # the first one is padding only
        ends = np.sort(rng.choice(33, 3, replace=False))
        row[: ends[2]] = np.repeat([5, 2, 9], np.diff(ends, prepend=0))
    start, end = (np.asarray(bound)[:, :, None] for bound in key_ranges(jnp.array(segments)))
    keys = np.arange(33)
    within = (keys >= start) & (keys < end)
    if causal:
        within &= keys <= keys[:, None]
    assert within.any(-1).all(), "a softmax of nothing is not a number"
    expected = attention.segment_mask(jnp.array(segments), causal)[:, 0]
    np.testing.assert_array_equal(within, expected)


# As in the decoder, as in the vision tower, and rows of no whole tile.
@needs_tokamax
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim", "causal"),
    [(256, 4, 2, 128, True), (128, 2, 2, 80, False), (90, 6, 2, 16, True)],
)
def test_tokamax_is_attention_and_so_are_its_gradients(
    on_cpus, length, heads, kv_heads, dim, causal
):
    arrays, segments = inputs(2, length, heads, kv_heads, dim)
    expected = outputs_and_gradients(arrays, segments, causal, "xla")
    found = outputs_and_gradients(arrays, segments, causal, "mosaic")
    assert_equal_but_for_rounding(found, expected)


@needs_tokamax
def test_devices_take_their_own_rows_and_heads(on_cpus):
    arrays, segments = inputs(8, 128, 4, 2, 16)
    expected = outputs_and_gradients(arrays, segments, True, "xla")
    by_rows = batch_sharding(make_mesh(MeshConfig(2, 1, 4)))
    found = outputs_and_gradients(*jax.device_put((arrays, segments), by_rows), True, "mosaic")
    assert_equal_but_for_rounding(found, expected)


@needs_tokamax
def test_a_layer_that_is_computed_again_has_the_same_gradients(on_cpus):
    arrays, segments = inputs(2, 64, 2, 2, 16)
    q, k, v, cotangent = arrays

    def loss(q, layers, implementation):
        def layer(x, scale):
            attend = functools.partial(
                attention.attention, segment_ids=jnp.asarray(segments), causal=True,
                implementation=implementation,
            )  # fmt: skip
            return attend(scale * x, k, v), None

        out, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), q, layers)
        return jnp.vdot(out, cotangent)

    found, expected = (
        jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(q, jnp.array([0.5, 2.0]), name)
        for name in ("mosaic", "xla")
    )
    assert_equal_but_for_rounding(found, expected)
