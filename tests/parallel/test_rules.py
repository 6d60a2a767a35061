"""Every leaf has a rule that fits, and a model in parts computes what the whole one does."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from puma_jax.config import ComputeConfig, DecoderConfig, LoraConfig, VisionConfig
from puma_jax.errors import ConfigError
from puma_jax.model import attention, decoder, encoder, qwen2_5_vl, qwen2_vl, qwen3_vl, vision
from puma_jax.model.dropout import token_keys
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.lora import add_lora, is_lora
from puma_jax.model.tree import map_named, named_leaves
from puma_jax.parallel import rules
from puma_jax.parallel.mesh import MeshConfig, batch_sharding, data_shards, make_mesh
from puma_jax.parallel.rules import sharding_fn, sharding_of, shardings
from puma_jax.rows import PackedBatch, PackedShape
from puma_jax.training.config import OptimizerConfig
from puma_jax.training.optimizer import make_optimizer
from tests.reference import FLOAT32, pack, random_image

QWEN2_VL_2B = qwen2_vl.PUBLISHED["Qwen/Qwen2-VL-2B-Instruct"]


def mesh_of(data=2, fsdp=2, tensor=2):
    count = data * fsdp * tensor
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[:count])


def adapted(config):
    """The shapes of a model with adapters on every linear of the decoder."""
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda: add_lora(encoder.init(config, key, "bfloat16"), LoraConfig(rank=8), key)
    )


def with_decoder(**changes):
    decoder = dataclasses.replace(QWEN2_VL_2B.decoder, **changes)
    return dataclasses.replace(QWEN2_VL_2B, decoder=decoder)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 4, 1)])
def test_every_leaf_of_a_model_its_adapters_and_its_optimizer_has_a_rule(tiny, sizes):
    mesh, optimizer = mesh_of(*sizes), optax.adamw(1e-3)
    published = [
        model for family in (qwen2_vl, qwen2_5_vl, qwen3_vl) for model in family.PUBLISHED.values()
    ]
    for config in (tiny.config, *published):
        params = adapted(config)
        trained = {name: leaf for name, leaf in named_leaves(params).items() if is_lora(name)}
        assert len(trained) == 14
        for tree in (params, trained):
            state = jax.eval_shape(optimizer.init, tree)
            of_tree, of_state = (
                named_leaves(shardings(one, mesh, config)) for one in (tree, state)
            )
            assert of_state.pop("0.count").is_fully_replicated
            moments = {f"0.{moment}.{name}" for name in of_tree for moment in ("mu", "nu")}
            assert of_state.keys() == moments
            assert all(of_state[name] == of_tree[name[5:]] for name in moments)


def test_muons_momentum_is_split_as_its_kernel(tiny):
    mesh, leaves = mesh_of(2, 2, 2), named_leaves(encoder.abstract(tiny.config))
    init = make_optimizer(OptimizerConfig(kind="muon"), 10).init
    of_state = named_leaves(shardings(jax.eval_shape(init, leaves), mesh, tiny.config))
    of_leaves = named_leaves(shardings(leaves, mesh, tiny.config))
    for name, sharding in of_leaves.items():
        kept = [of_state[one] for one in of_state if one.endswith("." + name)]
        assert kept == [sharding] * (1 if name.endswith(".kernel") else 2)


def test_axes_of_some_leaves():
    mesh, leaves = mesh_of(), named_leaves(adapted(QWEN2_VL_2B))
    expected = {
        "decoder.embedding.table": P(None, ("fsdp", "tensor")),
        "decoder.layers.attention_norm.scale": P(),
        "decoder.layers.attention.query.kernel": P(None, "fsdp", "tensor"),
        "decoder.layers.attention.value.bias": P(None, "tensor"),
        "decoder.layers.attention.out.lora_a": P(None, "tensor", None),
        "decoder.layers.mlp.gate.lora_b": P(None, None, "tensor"),
        "decoder.layers.mlp.down.kernel": P(None, "tensor", "fsdp"),
        "decoder.norm.scale": P(),
        "vision.blocks.attention.qkv.kernel": P(None, "fsdp", None),
        "vision.blocks.up.bias": P(None, "tensor"),
        "vision.merger.up.kernel": P("fsdp", "tensor"),
        "vision.merger.norm.bias": P(),
    }
    for name, spec in expected.items():
        assert sharding_of(name, leaves[name], mesh, QWEN2_VL_2B).spec == spec, name


def test_layers_are_never_split():
    for name, sharding in named_leaves(
        shardings(adapted(QWEN2_VL_2B), mesh_of(1, 2, 4), QWEN2_VL_2B)
    ).items():
        if name.startswith(("decoder.layers.", "vision.blocks.")):
            assert not sharding.spec or sharding.spec[0] is None, name


# What is not split over "tensor", the vision attention above all, is a tenth of the weights.
@pytest.mark.parametrize(
    ("sizes", "excess"), [((1, 8, 1), 1.01), ((1, 4, 2), 1.12), ((1, 2, 4), 1.35)]
)
def test_a_device_holds_little_more_than_its_share(sizes, excess):
    params = encoder.abstract(QWEN2_VL_2B, "bfloat16")
    where = shardings(params, mesh_of(*sizes), QWEN2_VL_2B)
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(where), strict=True))
    whole = sum(leaf.size for leaf, _ in pairs)
    share = sum(np.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in pairs)
    assert whole > 2e9
    assert 1 < share / (whole / 8) < excess


@pytest.mark.parametrize(("kv_heads", "split"), [(1, False), (2, False), (4, True), (12, True)])
def test_key_and_value_heads_that_do_not_divide_are_held_whole(kv_heads, split):
    config, mesh = with_decoder(kv_heads=kv_heads), mesh_of(1, 2, 4)
    leaves = named_leaves(adapted(config))
    for part in ("key", "value", "query"):
        expected = "tensor" if split or part == "query" else None
        for leaf in ("kernel", "bias", "lora_b"):
            name = f"decoder.layers.attention.{part}.{leaf}"
            assert sharding_of(name, leaves[name], mesh, config).spec[-1] == expected, name


def test_query_heads_must_divide():
    leaf = jax.ShapeDtypeStruct((), "float32")
    with pytest.raises(ConfigError, match=r"^mesh axis tensor=8 does not divide the 12 attention"):
        sharding_of("count", leaf, mesh_of(1, 1, 8), QWEN2_VL_2B)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("head.kernel", (4, 4), r"^head\.kernel \(4, 4\) has no rule"),
        ("decoder.layers.mlp.up.scale", (2, 4), r"mlp\.up\.scale \(2, 4\) has no rule"),
        ("mydecoder.norm_scale", (4,), "has no rule"),
        (
            "0.mu.decoder.layers.mlp.up.kernel",
            (2, 7, 4),
            r"^0\.mu.*\.kernel \(2, 7, 4\) on the mesh data=2, fsdp=2, tensor=2: "
            r"axis 1 does not divide over fsdp$",
        ),
        ("decoder.embedding.table", (9, 6), "axis 1 does not divide over fsdp × tensor$"),
        ("decoder.layers.mlp.up.kernel", (1,), "its rule .* names 3 axes$"),
    ],
)
def test_leaves_that_no_rule_fits(name, shape, message):
    leaf = jax.ShapeDtypeStruct(shape, "float32")
    with pytest.raises(ConfigError, match=message):
        sharding_of(name, leaf, mesh_of(), QWEN2_VL_2B)


def test_a_rule_that_uses_an_axis_twice(monkeypatch):
    monkeypatch.setattr(rules, "RULES", (("kernel", P(("fsdp", "tensor"), "fsdp")),))
    leaf = jax.ShapeDtypeStruct((8, 8), "float32")
    with pytest.raises(ConfigError, match=r"^a\.kernel \(8, 8\) .* of the mesh twice$"):
        sharding_of("a.kernel", leaf, mesh_of(), QWEN2_VL_2B)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_states_do_not_depend_on_the_mesh_and_neither_does_dropout(tiny, sizes):
    mesh, key = mesh_of(*sizes), jax.random.key(0)
    items = [tiny.item(f"Text {i}.", random_image(60 + 9 * i, 80, seed=i)) for i in range(7)]
    rows, where = pack(items, PackedShape(8, 256, 8, 128, 16, data_shards=data_shards(mesh)))
    numbers = np.full(16, -1, np.int32)
    numbers[where.slot] = range(7)

    def adapt(params):
        adapted = add_lora(params, LoraConfig(rank=8, alpha=16.0, dropout=0.5), key)
        return map_named(lambda name, leaf: leaf + 0.05 * name.endswith("lora_b"), adapted)

    @jax.jit
    def states(params, rows, numbers):
        keys = token_keys(key, rows, numbers, data_shards=data_shards(mesh))
        return [
            encoder.encode(
                params, rows, FLOAT32, data_shards=data_shards(mesh), dropout_keys=dropout_keys
            )
            for dropout_keys in (None, keys)
        ]

    read = open_checkpoint(tiny.folder).read(
        dtype="float32", shardings=sharding_fn(mesh, tiny.config)
    )
    assert not read.decoder.layers.mlp.up.kernel[...].is_fully_replicated
    parts = adapt(read)
    parts = jax.device_put(parts, shardings(parts, mesh, tiny.config))
    split = jax.device_put((rows, numbers), batch_sharding(mesh))
    alone = states(adapt(tiny.params), rows, jnp.array(numbers))
    for one, many in zip(alone, states(parts, *split), strict=True):
        np.testing.assert_allclose(many[where.slot], one[where.slot], rtol=0, atol=1e-5)
    assert np.abs(alone[0] - alone[1])[where.slot].max() > 0.1


@pytest.mark.parametrize(("sizes", "share"), [((1, 8, 1), 0.5), ((1, 4, 2), 0.6)])
def test_weights_travel_and_rows_stay(sizes, share, monkeypatch):
    """Rows pinned to their devices: no collective moves them, and the gradient takes less room."""
    mesh = mesh_of(*sizes)
    pinned = gradient_of_a_small_model(mesh)
    monkeypatch.setattr(decoder, "constrain_batch_sharding", lambda x: x)
    monkeypatch.setattr(vision, "constrain_batch_sharding", lambda x: x)
    free = gradient_of_a_small_model(mesh)
    all_rows = "all-gather f32[8,256,256]"
    assert all_rows in gathers(free)
    assert all_rows not in gathers(pinned)
    used = [one.memory_analysis().temp_size_in_bytes for one in (pinned, free)]
    assert used[0] < share * used[1]


def gradient_of_a_small_model(mesh):
    """A model of width 256 and its gradient for 8 rows of 256 tokens, compiled."""
    config = dataclasses.replace(
        QWEN2_VL_2B,
        image_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
        vision=VisionConfig(layers=2, width=256, heads=4, mlp_width=1024, out_width=256),
        decoder=DecoderConfig(
            vocab_size=512,
            width=256,
            layers=2,
            heads=8,
            kv_heads=4,
            head_dim=32,
            mlp_width=1024,
            mrope_section=(4, 6, 6),
        ),
        kept_layers=(0, 1),
    )

    def spread(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    params = encoder.abstract(config)
    params = jax.tree.map(spread, params, shardings(params, mesh, config))
    numbers = {
        "tokens": (8, 256),
        "segment_ids": (8, 256),
        "positions": (8, 256, 3),
        "image_token_index": (8, 256),
        "patches": (8, 256, 588),
        "patch_segment_ids": (8, 256),
        "patch_positions": (8, 256, 2),
        "pool_index": (16,),
    }
    rows = PackedBatch(
        **{
            name: spread(
                np.empty(shape, "uint8" if name == "patches" else "int32"), batch_sharding(mesh)
            )
            for name, shape in numbers.items()
        }
    )
    compute = ComputeConfig(dtype="float32", remat="full")

    def loss(params, rows):
        return jnp.sum(encoder.encode(params, rows, compute, data_shards=data_shards(mesh)) ** 2)

    return jax.jit(jax.grad(loss)).lower(params, rows).compile()


def gathers(compiled):
    """The results of all gathers of a program, as HLO writes them."""
    found = re.findall(r" = (\w+\[[\d,]*\])\S* (all-gather)(?:-start)?\(", compiled.as_text())
    return {f"{name} {shape}" for shape, name in found}


def test_one_device_is_told_nothing(tiny):
    """The program for one device is what it was before there were meshes."""
    rows = jnp.zeros((2, 128, 64))
    one = mesh_of(1, 1, 1)
    text = [
        jax.jit(attention.constrain_batch_sharding).lower(x).as_text()
        for x in (rows, jax.device_put(rows, batch_sharding(one)))
    ]
    assert all("sharding_constraint" not in of for of in text)
    many = jax.device_put(rows, batch_sharding(mesh_of(2, 1, 1)))
    assert (
        "sharding_constraint" in jax.jit(attention.constrain_batch_sharding).lower(many).as_text()
    )
