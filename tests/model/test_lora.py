"""LoRA: two leaves that change nothing at first, and merge into the kernel without a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from puma_jax.config import LoraConfig
from puma_jax.errors import ConfigError
from puma_jax.model import encoder
from puma_jax.model.lora import add_lora, is_lora, merge, partition
from puma_jax.model.tree import named_leaves
from puma_jax.rows import RowShape
from tests.reference import FLOAT32, encode, pack

CONFIG = LoraConfig(rank=4, alpha=8.0, dropout=0.5)


@pytest.fixture(scope="module")
def rows(tiny):
    items = [tiny.item("A red bicycle."), tiny.item("A blue one.")]
    return pack(items, RowShape(1, 256, 0, 1, 2))[0]


def with_noise(params):
    """The model with adapters whose B is no longer zero."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.05 if "lora_b" in str(path) else leaf, params
    )


def test_fresh_adapters_change_nothing(tiny, rows):
    adapted = add_lora(tiny.params, CONFIG, jax.random.key(0))
    np.testing.assert_array_equal(
        encode(adapted, rows, FLOAT32), encode(tiny.params, rows, FLOAT32)
    )
    assert not any(map(is_lora, named_leaves(tiny.params)))


def test_the_adapted_kernel_is_w_plus_s_a_b(tiny):
    adapted = with_noise(add_lora(tiny.params, CONFIG, jax.random.key(0)))
    before = named_leaves(adapted)
    after = named_leaves(merge(adapted))
    for target in ("attention.query", "attention.out", "mlp.down"):
        name = f"decoder.layers.{target}"
        kernel, a, b = (
            np.asarray(before[f"{name}.{leaf}"], np.float64)
            for leaf in ("kernel", "lora_a", "lora_b")
        )
        np.testing.assert_allclose(
            after[f"{name}.kernel"], kernel + 8 / 4 * a @ b, rtol=0, atol=1e-6
        )
    assert jax.tree.structure(merge(adapted)) == jax.tree.structure(tiny.params)


def test_merging_changes_no_state(tiny, rows):
    adapted = with_noise(add_lora(tiny.params, CONFIG, jax.random.key(0)))
    ours = encode(adapted, rows, FLOAT32)
    assert np.abs(ours - encode(tiny.params, rows, FLOAT32)).max() > 0.01
    np.testing.assert_allclose(encode(merge(adapted), rows, FLOAT32), ours, rtol=0, atol=1e-5)


def test_only_the_targets_are_adapted(tiny):
    config = LoraConfig(rank=2, targets=("query", "down"))
    adapted = add_lora(tiny.params, config, jax.random.key(0))
    found = {name.rsplit(".", 2)[1] for name in named_leaves(adapted) if is_lora(name)}
    assert found == {"query", "down"}
    with pytest.raises(ConfigError, match=r"\['head'\] are not among key, out, query, value,"):
        add_lora(tiny.params, LoraConfig(targets=("head",)), jax.random.key(0))


def test_dropout_acts_on_the_adapter_alone_and_only_with_a_key(tiny, rows):
    adapted = with_noise(add_lora(tiny.params, CONFIG, jax.random.key(0)))
    still = encode(adapted, rows, FLOAT32)
    np.testing.assert_array_equal(still, encode(adapted, rows, FLOAT32))
    first, again, other = (
        encode(adapted, rows, FLOAT32, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    base = encode(tiny.params, rows, FLOAT32, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(base, encode(tiny.params, rows, FLOAT32))


def test_the_partition_trains_adapters_alone_and_computes_no_other_gradient(tiny, rows):
    adapted = add_lora(tiny.params, CONFIG, jax.random.key(0))
    structure, trained, frozen = partition(adapted, is_lora)
    assert set(map(is_lora, named_leaves(nnx.merge(structure, trained, frozen)))) == {True, False}

    def loss(trained):
        params = nnx.merge(structure, trained, frozen)
        return jnp.sum(encoder.encode(params, rows, FLOAT32) ** 2)

    gradient = jax.jit(jax.grad(loss))(trained)
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == 14
    assert all(leaf.ndim == 3 and 4 in leaf.shape[1:] for leaf in leaves)
    # B starts at zero, so A has no gradient yet and B has one everywhere.
    sizes = {leaf.shape: float(jnp.abs(leaf).max()) for leaf in leaves}
    assert max(sizes.values()) > 0
