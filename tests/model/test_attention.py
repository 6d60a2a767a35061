"""Attention on packed rows against a softmax written out in float64."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax.config import ComputeConfig
from puma_jax.errors import AttentionError
from puma_jax.model import kernels
from puma_jax.model.attention import attention, describe

SEGMENTS = np.array([[1] * 5 + [6] * 9 + [0] * 2, [1] * 16])


def written_out(q, k, v, segments, causal):
    """Softmax attention, one row and one head at a time."""
    out = np.zeros(q.shape)
    rows, length, heads, dim = q.shape
    for row in range(rows):
        for head in range(heads):
            kv = head * k.shape[2] // heads
            scores = q[row, :, head] @ k[row, :, kv].T / np.sqrt(dim)
            seen = segments[row][:, None] == segments[row][None]
            if causal:
                seen = seen & np.tri(length, dtype=bool)
            weights = np.where(seen, np.exp(scores), 0)
            out[row, :, head] = weights / weights.sum(1, keepdims=True) @ v[row, :, kv]
    return out


@pytest.mark.parametrize("implementation", ["xla", "auto"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_a_softmax_inside_each_segment(implementation, causal, kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 16, 4, 8))
    k, v = rng.normal(size=(2, 2, 16, kv_heads, 8))
    ours = attention(
        *(jnp.array(x, jnp.float32) for x in (q, k, v)),
        segment_ids=jnp.array(SEGMENTS),
        causal=causal,
        implementation=implementation,
    )
    np.testing.assert_allclose(ours, written_out(q, k, v, SEGMENTS, causal), atol=1e-6)


def test_an_implementation_is_never_replaced():
    x = jnp.ones((1, 2, 1, 4))
    on_gpus = '^attention "{}" runs on NVIDIA GPUs and this is cpu: ask for "auto" or "xla"$'
    for name, message in {
        "flash": '^attention implementation "flash" is not one of auto, xla, splash, mosaic, ',
        "splash": '^attention "splash" runs on TPUs and this is cpu: ask for "auto" or "xla"$',
        **{name: on_gpus.format(name) for name in ("mosaic", "triton", "cudnn")},
    }.items():
        with pytest.raises(AttentionError, match=message):
            attention(x, x, x, segment_ids=jnp.ones((1, 2), int), causal=True, implementation=name)
        with pytest.raises(AttentionError, match=message):
            describe(ComputeConfig(attention=name))


def test_a_line_about_the_attention_in_use():
    assert describe(ComputeConfig()) == "attention: xla (auto, cpu)"
    assert describe(ComputeConfig(attention="xla")) == "attention: xla (cpu)"


def card(monkeypatch, capability, tokamax):
    """Pretend that this process has a GPU of some compute capability, and some tokamax."""
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(kernels.jax, "local_devices", lambda backend: [device])
    monkeypatch.setattr(kernels, "_tokamax", lambda: tokamax)


@pytest.mark.parametrize(
    ("capability", "tokamax", "chosen", "why"),
    [
        ("9.0", "0.0.17", "mosaic", ""),
        ("10.0", "0.0.17", "mosaic", ""),
        ("8.0", "0.0.17", "triton", "needs a compute capability of 9.0 to below 11.0 and that"),
        ("12.0", "0.0.17", "triton", "and that of this GPU is 12.0"),
        ("9.0", None, "cudnn", "mosaic needs tokamax 0.0.17, which is not installed"),
        ("9.0", "0.0.18", "cudnn", "mosaic needs tokamax 0.0.17, which is 0.0.18 here"),
        ("7.5", "0.0.17", "xla", "and that of this GPU is 7.5"),
        ("gfx942", "0.0.17", "xla", "and that of this GPU is unknown"),
    ],
)  # fmt: skip
def test_each_card_gets_its_fastest_kernel(monkeypatch, capability, tokamax, chosen, why):
    card(monkeypatch, capability, tokamax)
    assert kernels.choose(kernels.Target("gpu", "bfloat16", 2048, 128)) == chosen
    line = kernels.describe("auto", "gpu", "bfloat16")
    assert line.startswith(f"attention: {chosen} (auto, gpu")
    assert why in line


def test_float32_short_rows_and_odd_heads_are_computed_by_xla(monkeypatch):
    card(monkeypatch, "9.0", None)
    for dtype, length, head_dim, chosen in [
        ("float32", 2048, 128, "xla"),
        ("bfloat16", 64, 128, "xla"),
        ("bfloat16", 2047, 128, "xla"),
        ("bfloat16", 2048, 20, "xla"),
        ("bfloat16", 2048, 80, "cudnn"),
    ]:
        assert kernels.choose(kernels.Target("gpu", dtype, length, head_dim)) == chosen
    line = kernels.describe("auto", "gpu", "float32")
    assert line.startswith("attention: xla (auto, gpu; mosaic ")
    with pytest.raises(AttentionError, match=r"bfloat16 or float16 and this is float32: ask for"):
        kernels.check("cudnn", kernels.Target("gpu", "float32", 2048, 128))
