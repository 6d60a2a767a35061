"""LoRA: two leaves that change nothing at first, and merge into the kernel without a trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax.config import LoraConfig
from puma_jax.errors import ConfigError
from puma_jax.model import encoder, layers
from puma_jax.model.dropout import dropout, token_keys
from puma_jax.model.lora import add_lora, is_lora, merge
from puma_jax.model.tree import assemble, named_leaves, partition
from puma_jax.rows import PackedShape
from puma_jax.schema import from_json
from tests.reference import FLOAT32, encode, pack, random_image

CONFIG = LoraConfig(rank=4, alpha=8.0, dropout=0.5)


@pytest.fixture(scope="module")
def rows(tiny):
    items = [tiny.item("A red bicycle."), tiny.item("A blue one.")]
    return pack(items, PackedShape(1, 256, 0, 1, 2))[0]


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
    with pytest.raises(ConfigError, match=r'targets\[0\] "head" is not one of query, key, value,'):
        from_json(LoraConfig, {"targets": ["head"]})


def test_dropout_acts_on_the_adapter_alone_and_only_with_keys(tiny, rows):
    adapted = with_noise(add_lora(tiny.params, CONFIG, jax.random.key(0)))
    still = encode(adapted, rows, FLOAT32)
    np.testing.assert_array_equal(still, encode(adapted, rows, FLOAT32))
    keys = [token_keys(jax.random.key(seed), rows, jnp.arange(2)) for seed in (1, 1, 2)]
    first, again, other = (encode(adapted, rows, FLOAT32, dropout_keys=of) for of in keys)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - still).max() > 1e-3
    assert np.abs(first - other).max() > 1e-3
    base = encode(tiny.params, rows, FLOAT32, dropout_keys=keys[0])
    np.testing.assert_array_equal(base, encode(tiny.params, rows, FLOAT32))


def numbered(items, shape, order):
    """Rows of the items in this order, the number of the item in each slot, the slot of each."""
    rows, packing = pack([items[i] for i in order], shape)
    numbers = np.full(shape.slots, -1, np.int32)
    numbers[packing.slot] = order
    slots = np.empty(len(items), int)
    slots[order] = packing.slot
    return rows, jnp.array(numbers), slots


def test_the_key_of_a_token_is_made_of_its_item_and_its_distance_to_ret(tiny):
    key = jax.random.key(7)
    texts = [tiny.item("Text." * n) for n in range(1, 6)]
    token = dataclasses.replace(
        texts[0],
        tokens=texts[0].tokens[-1:],
        positions=texts[0].positions[-1:],
        image_token_mask=texts[0].image_token_mask[-1:],
    )
    # One token, alone in its row, ends where the unused slots point to.
    for items, shape in (
        ([*texts, token, token], PackedShape(4, 256, 0, 1, 16, data_shards=2)),
        ([token], PackedShape(1, 128, 0, 1, 4)),
    ):
        rows, numbers, slots = numbered(items, shape, range(len(items)))
        keys = token_keys(key, rows, numbers, data_shards=shape.data_shards).reshape(
            shape.data_shards, -1
        )
        for number, (item, slot) in enumerate(zip(items, slots, strict=True)):
            group = slot // (shape.slots // shape.data_shards)
            distances = np.arange(len(item.tokens))
            of_item = jax.random.fold_in(key, number)
            expected = jax.vmap(jax.random.fold_in, (None, 0))(of_item, distances)
            assert (keys[group, rows.pool_index[slot] - distances] == expected).all()


def test_dropout_does_not_depend_on_where_an_item_is_packed(tiny):
    adapted = with_noise(add_lora(tiny.params, CONFIG, jax.random.key(0)))
    items = [tiny.item("Text." * n) for n in range(1, 4)]
    items += [tiny.item("Text.", random_image(60 + 9 * i, 80, seed=i)) for i in range(3)]

    def vectors(shape, order):
        rows, numbers, slots = numbered(items, shape, order)
        keys = token_keys(jax.random.key(5), rows, numbers, data_shards=shape.data_shards)
        states = encode(adapted, rows, FLOAT32, data_shards=shape.data_shards, dropout_keys=keys)
        return np.asarray(encoder.l2_normalize(states))[slots]

    one_row = PackedShape(1, 1024, 1, 256, 6)
    expected = vectors(one_row, range(6))
    for shape in (
        one_row,
        PackedShape(2, 512, 2, 128, 20, data_shards=2),
        PackedShape(8, 256, 8, 128, 16, data_shards=4),
    ):
        found = vectors(shape, [4, 1, 5, 0, 2, 3])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_items_of_the_same_text_have_masks_of_their_own(tiny):
    adapted = with_noise(add_lora(tiny.params, CONFIG, jax.random.key(0)))
    rows, numbers, slots = numbered(
        [tiny.item("Text.")] * 2, PackedShape(1, 256, 0, 1, 2), range(2)
    )
    keys = token_keys(jax.random.key(0), rows, numbers)
    alike = encode(adapted, rows, FLOAT32)[slots]
    apart = encode(adapted, rows, FLOAT32, dropout_keys=keys)[slots]
    assert np.abs(alike[0] - alike[1]).max() < 1e-5
    assert np.abs(apart[0] - apart[1]).max() > 1e-3


def test_every_linear_of_every_layer_draws_from_keys_of_its_own(tiny, rows, monkeypatch):
    seen = []

    def record(x, keys, rate):
        jax.debug.callback(seen.append, jax.random.key_data(keys))
        return x

    monkeypatch.setattr(layers, "dropout", record)
    adapted = add_lora(tiny.params, CONFIG, jax.random.key(0))
    keys = token_keys(jax.random.key(0), rows, jnp.arange(2))
    encoder.encode(adapted, rows, FLOAT32, dropout_keys=keys)
    jax.effects_barrier()
    assert len(seen) == 4 * 7
    of_items = np.stack(seen)[:, np.asarray(rows.segment_ids) > 0].reshape(-1, 2)
    assert len(np.unique(of_items, axis=0)) == len(of_items)


def test_a_mask_keeps_its_share_and_the_mean():
    keys = jax.random.split(jax.random.key(0), (8, 16))
    dropped = np.asarray(dropout(jnp.full((8, 16, 1000), 3.0, jnp.bfloat16), keys, 0.25))
    assert dropped.dtype == jnp.bfloat16
    assert set(np.unique(dropped.astype(float))) == {0.0, 4.0}
    assert abs((dropped > 0).mean() - 0.75) < 4 * (0.25 * 0.75 / dropped.size) ** 0.5


def test_the_partition_trains_adapters_alone_and_computes_no_other_gradient(tiny, rows):
    adapted = add_lora(tiny.params, CONFIG, jax.random.key(0))
    trained, frozen = partition(adapted, is_lora)
    assert all(map(is_lora, trained))
    assert not any(map(is_lora, frozen))

    def loss(trained):
        params = assemble(adapted, {**frozen, **trained})
        return jnp.sum(encoder.encode(params, rows, FLOAT32) ** 2)

    gradient = jax.jit(jax.grad(loss))(trained)
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == 14
    assert all(leaf.ndim == 3 and 4 in leaf.shape[1:] for leaf in leaves)
    # B starts at zero, so A has no gradient yet and B has one everywhere.
    sizes = {leaf.shape: float(jnp.abs(leaf).max()) for leaf in leaves}
    assert max(sizes.values()) > 0
