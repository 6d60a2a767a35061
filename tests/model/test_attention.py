"""Attention on packed rows against a softmax written out in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax.config import ComputeConfig
from puma_jax.errors import AttentionError
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
    for name, message in {
        "flash": '^attention implementation "flash" is not one of auto, xla, splash$',
        "splash": '^attention "splash" runs on TPUs and this is cpu: ask for "auto" or "xla"$',
    }.items():
        with pytest.raises(AttentionError, match=message):
            attention(x, x, x, segment_ids=jnp.ones((1, 2), int), causal=True, implementation=name)
        with pytest.raises(AttentionError, match=message):
            describe(ComputeConfig(attention=name))


def test_a_line_about_the_attention_in_use():
    assert describe(ComputeConfig()) == "attention: xla (auto, cpu)"
    assert describe(ComputeConfig(attention="xla")) == "attention: xla (cpu)"
