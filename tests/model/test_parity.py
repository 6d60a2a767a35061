"""The ladder: every part of the model against transformers, float32, from the pixels up."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from puma_jax.config import ComputeConfig
from puma_jax.data.images import patchify
from puma_jax.data.positions import patch_positions
from puma_jax.model import encoder, rope
from puma_jax.model.vision import normalize
from puma_jax.rows import PackedShape
from tests.reference import (
    FLOAT32,
    encode,
    grid_thw,
    image_processor,
    pack,
    pixel_values,
    random_image,
)

TOLERANCE = 1e-5
SHAPES = [(112, 112), (60, 300), (200, 90)]  # pixels; square, wide, tall


def modeling(pair):
    """The module of transformers that the reference is from."""
    return importlib.import_module(type(pair.torch).__module__)


def first(stacked):
    """The first of stacked layers."""
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert np.abs(theirs).max() > 0.1, "the reference is too small for the tolerance to mean much"
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_patch_embedding(either):
    vision = either.config.vision
    for shape in SHAPES:
        image = random_image(*shape)
        patches, (rows, columns) = patchify(image, vision, either.config.images)
        processed = image_processor(either.config.images, vision)(image, return_tensors="pt")
        assert processed["image_grid_thw"].tolist() == [[1, rows, columns]]
        embedding = either.params.vision.patch_embedding
        theirs = either.torch.model.visual.patch_embed(processed["pixel_values"])
        # A sum of some thousand products, which another CPU adds in another order.
        assert_close(embedding(jnp.array(patches[None]), "float32")[0], theirs, 3e-5)


def test_pixels_are_normalized_as_the_published_processor_does(family):
    image, vision = random_image(100, 140), family.config.vision
    patches, _ = patchify(image, vision, family.config.images)
    theirs = image_processor(family.config.images, vision)(image, return_tensors="np")[
        "pixel_values"
    ]
    first_frame = theirs.reshape(len(patches), 3, 2, -1)[:, :, 0].reshape(len(patches), -1)
    ours = normalize(jnp.array(patches[None]), vision.image_mean, vision.image_std)[0]
    np.testing.assert_allclose(np.asarray(ours), first_frame, rtol=0, atol=1e-6)


def test_two_dimensional_rope(either):
    vision = either.config.vision
    positions = patch_positions(6, 10, 2)
    q = normal(60, vision.heads, vision.head_dim)
    cos, sin = either.torch.model.visual.rotary_pos_emb(torch.tensor(q), torch.tensor(positions))
    rotated = modeling(either).apply_rotary_pos_emb_vision
    theirs, _ = rotated(torch.tensor(q), torch.tensor(q), cos, sin)
    angles = rope.axial_angles(jnp.array(positions[None]), vision.head_dim, vision.rope_base)
    assert_close(rope.rotate(jnp.array(q[None]), angles)[0], theirs)


def test_vision_block(either):
    vision, tower = either.config.vision, either.torch.model.visual
    x, positions = normal(24, vision.width), patch_positions(4, 6, 2)
    embeddings = tower.rotary_pos_emb(torch.tensor(x), torch.tensor(positions))
    theirs = tower.blocks[0](
        torch.tensor(x), cu_seqlens=torch.tensor([0, 24]), position_embeddings=embeddings
    )
    angles = rope.axial_angles(jnp.array(positions[None]), vision.head_dim, vision.rope_base)
    block = first(either.params.vision.blocks)
    assert_close(block(jnp.array(x[None]), angles, jnp.ones((1, 24), int), "xla")[0], theirs)


def test_tower_and_merger_on_three_images_in_one_row(either):
    images = [random_image(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    item = either.item("Three.", *images)
    rows, _ = pack([item], PackedShape(1, 512, 1, 512, 1), either.config.vision)
    ours = either.params.vision(rows.patches, rows.patch_segment_ids, rows.patch_positions, FLOAT32)
    with torch.no_grad():
        theirs = either.torch.model.visual(
            pixel_values(item.patches, either.config.vision), grid_thw=grid_thw(item)
        )
    of_reference = [theirs.pooler_output, *getattr(theirs, "deepstack_features", [])]
    assert len(of_reference) == 1 + len(either.config.vision.deepstack_blocks)
    for mine, their in zip(ours, of_reference, strict=True):
        assert_close(mine[0, : len(item.patches) // 4], their)


@pytest.mark.parametrize("shapes", [SHAPES[:1], SHAPES, [(30, 600)], [(1, 1), (5, 9)]])
def test_mrope_ids(family, shapes):
    item = family.item("A text.", *[random_image(*shape) for shape in shapes])
    theirs, _ = family.torch.model.get_rope_index(
        torch.tensor(item.tokens[None]),
        mm_token_type_ids=torch.tensor(item.image_token_mask[None].astype(np.int64)),
        image_grid_thw=grid_thw(item),
    )
    np.testing.assert_array_equal(item.positions, theirs[:, 0].numpy().T)


def test_mrope(either):
    decoder = either.config.decoder
    positions = np.random.default_rng(0).integers(0, 900, (3, 50))
    q = normal(1, decoder.heads, 50, decoder.head_dim)
    cos, sin = either.torch.model.language_model.rotary_emb(
        torch.tensor(q), torch.tensor(positions[:, None])
    )
    theirs, _ = modeling(either).apply_rotary_pos_emb(torch.tensor(q), torch.tensor(q), cos, sin)
    angles = rope.mrope_angles(
        jnp.array(positions.T[None]),
        decoder.head_dim,
        decoder.rope_base,
        decoder.mrope_section,
        decoder.mrope_interleaved,
    )
    ours = rope.rotate(jnp.array(q.swapaxes(1, 2)), angles)
    # Angles reach 900 radians, where float32 resolves 6e-5: the only place it could be seen.
    assert_close(ours, theirs.transpose(1, 2))


def test_decoder_layer(either):
    decoder, model = either.config.decoder, either.torch.model.language_model
    x, positions = normal(1, 40, decoder.width), np.arange(40).repeat(3).reshape(40, 3)
    embeddings = model.rotary_emb(torch.tensor(x), torch.tensor(positions.T[:, None]))
    mask = torch.full((1, 1, 40, 40), -torch.inf).triu(1)
    theirs = model.layers[0](torch.tensor(x), attention_mask=mask, position_embeddings=embeddings)
    angles = rope.mrope_angles(
        jnp.array(positions[None]),
        decoder.head_dim,
        decoder.rope_base,
        decoder.mrope_section,
        decoder.mrope_interleaved,
    )
    layer = first(either.params.decoder.layers)
    assert_close(layer(jnp.array(x), angles, jnp.ones((1, 40), int), "xla"), theirs)


CASES = {
    "text": ("A red bicycle.", []),
    "image": ("", [(112, 112)]),
    "image and text": ("Make it blue.", [(90, 200)]),
    "three images": ("Which is the tallest?", SHAPES),
    "very wide": ("", [(28, 700)]),
    "one pixel": ("", [(1, 1)]),
    "tiny": ("Tiny.", [(7, 3)]),
}


@pytest.mark.parametrize("case", CASES)
def test_final_states(either, case):
    text, shapes = CASES[case]
    item = either.item(text, *[random_image(*shape, seed=i) for i, shape in enumerate(shapes)])
    assert_close(either.states([item], PackedShape(1, 512, 1, 512, 1))[0], either.expected(item))


def test_final_states_of_all_cases_packed_together(either):
    items = [
        either.item(text, *[random_image(*shape, seed=i) for i, shape in enumerate(shapes)])
        for text, shapes in CASES.values()
    ]
    ours = either.states(items, PackedShape(3, 384, 2, 512, 10))
    for mine, item in zip(ours, items, strict=True):
        assert_close(mine, either.expected(item))


def test_groups_see_only_their_own_part(tiny):
    items = [tiny.item(f"Text {i}.", random_image(60 + 9 * i, 80, seed=i)) for i in range(8)]
    shape = PackedShape(8, 256, 8, 128, 16, data_shards=4)
    rows, packing = pack(items, shape)
    grouped = encode(tiny.params, rows, FLOAT32, data_shards=4)
    for slot, item in zip(packing.slot, items, strict=True):
        assert_close(np.asarray(grouped)[slot], tiny.expected(item))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(family, remat):
    item = family.item("A.", random_image(60, 60))
    rows, _ = pack([item], PackedShape(1, 128, 1, 64, 1), family.config.vision)

    def loss(params, compute):
        return jnp.sum(encoder.encode(params, rows, compute) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(family.params, FLOAT32)
    again = gradient(family.params, ComputeConfig(dtype="float32", remat=remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()) + 1e-9)


def test_bfloat16_stays_near_float32(family):
    items = [family.item("A red bicycle."), family.item("Blue.", random_image(90, 90))]
    rows, packing = pack(items, PackedShape(2, 256, 1, 64, 2), family.config.vision)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), family.params)
    exact = encoder.l2_normalize(encode(family.params, rows, FLOAT32))
    for params in (half, family.params):
        state = encode(params, rows, ComputeConfig(dtype="bfloat16"))
        assert state.dtype == jnp.float32
        cosine = jnp.sum(encoder.l2_normalize(state) * exact, -1)[packing.slot]
        assert cosine.min() > 0.995
