"""Fewer visual tokens: squares of them are pooled behind the tower, in every family."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from puma_jax import Embedder
from puma_jax.config import ImageConfig
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.export import sentence_transformers, stablehlo
from puma_jax.export.agreement import Agreement
from puma_jax.export.card import model_card
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.vision import pool_tokens
from puma_jax.rows import PackedShape
from tests.reference import FLOAT32, pack, pooled_features, random_image

WIDE, TALL, SMALL = random_image(120, 260), random_image(300, 100, seed=1), random_image(9, 5)
ITEMS = [
    {"image": WIDE},
    {"text": "Blue.", "image": TALL},
    {"text": "Two.", "image": [SMALL, WIDE]},
    "A text.",
]


def limits_of(pair, **pooling) -> ImageConfig:
    side = 2 * pair.config.vision.patch_size
    return ImageConfig(4 * side**2, 40 * side**2, **pooling)


def embedder_of(pair, **pooling) -> Embedder:
    return Embedder.load(pair.folder, dtype="float32", images=limits_of(pair, **pooling))


def expected_vector(pair, embedder: Embedder, raw) -> np.ndarray:
    """The vector by transformers' tower and decoder, with torch's pooling between them."""
    item = embedder.preprocess(raw)
    ids, kinds = (
        torch.tensor(array[None].astype(np.int64)) for array in (item.tokens, item.image_token_mask)
    )
    model, grids, more = pair.torch.model, None, {}
    embeddings = model.get_input_embeddings()(ids)
    if isinstance(raw, dict):
        images = raw["image"] if isinstance(raw["image"], list) else [raw["image"]]
        config = embedder.config
        (features, *deepstack), grids = pooled_features(model, config.vision, config.images, images)
        assert len(features) == kinds.sum()
        embeddings[0, kinds[0].bool()] = features
        if deepstack:
            more = {"visual_pos_masks": kinds.bool(), "deepstack_visual_embeds": deepstack}
    positions, _ = model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
    np.testing.assert_array_equal(item.positions, positions[:, 0].numpy().T)
    with torch.no_grad():
        states = model.language_model(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, **more
        )
    return torch.nn.functional.normalize(states.last_hidden_state[0, -1], dim=0).numpy()


def test_pooled_vectors_are_those_of_the_reference(family):
    embedder = embedder_of(family, spatial_pool_stride=2)
    ours = embedder.encode(ITEMS)
    for raw, vector in zip(ITEMS, ours, strict=True):
        theirs = expected_vector(family, embedder, raw)
        np.testing.assert_allclose(vector, theirs, rtol=0, atol=1e-5)


def test_the_order_of_patches_changes_no_visual_token(family):
    """Tokens of pooled squares, and drawn ones in front, are those of the image without pooling."""
    pooling = (
        {},
        {"spatial_pool_stride": 2},
        {"spatial_pool_stride": 2, "spatial_pool_mode": "random"},
    )
    embedders = [embedder_of(family, **each) for each in pooling]
    side = 4 * family.config.vision.patch_size
    image = random_image(3 * side, 2 * side)
    items = [embedder.preprocess({"image": image}) for embedder in embedders]
    rows, packing = pack(items, PackedShape(3, 128, 3, 128, 3), family.config.vision)
    tower = jax.jit(family.params.vision.__class__.__call__, static_argnums=4)
    features = tower(
        family.params.vision, rows.patches, rows.patch_segment_ids, rows.patch_positions, FLOAT32
    )
    plain, pooled, drawn = (
        [
            {
                tuple(at): values
                for at, values in zip(
                    item.patch_positions[::4].tolist(), of_all[row, :24], strict=True
                )
            }
            for of_all in map(np.asarray, features)
        ]
        for row, item in zip(packing.patch_row, items, strict=True)
    )
    for ours, others in ((pooled, plain), (drawn, plain)):
        for tokens, expected in zip(ours, others, strict=True):
            assert tokens.keys() == expected.keys()
            for at, values in tokens.items():
                np.testing.assert_allclose(values, expected[at], rtol=0, atol=1e-5)
    # What is pooled lies in one square of the image.
    for item, row, embedder in zip(items[1:], packing.patch_row[1:], embedders[1:], strict=True):
        squares = item.patch_positions.reshape(6, 16, 2) // 4
        assert (squares == squares[:, :1]).all()
        assert squares[:, 0].tolist() == np.indices((3, 2)).reshape(2, -1).T.tolist()
        stride, mode = embedder.params.spatial_pool
        for tokens, expected in zip(features, plain, strict=True):
            each = np.array([expected[tuple(at)] for at in item.patch_positions[::4].tolist()])
            each = each.reshape(6, 4, -1)
            wanted = each[:, 0] if mode == "random" else each.mean(1)
            found = pool_tokens(tokens, stride, mode)[row, :6]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert embedders[2].params.spatial_pool == (2, "random")


def test_the_draw_is_one_of_four_by_the_content_of_the_image(tiny):
    embedder = embedder_of(tiny, spatial_pool_stride=2, spatial_pool_mode="random")
    places = []
    for seed in range(12):
        image = random_image(224, 168, seed=seed)
        item = embedder.preprocess({"image": image})
        again = embedder.preprocess({"text": "Else.", "image": np.asarray(image)})
        np.testing.assert_array_equal(item.patch_positions, again.patch_positions)
        np.testing.assert_array_equal(item.patches, again.patches)
        at = item.patch_positions.reshape(-1, 16, 2)[:, 0] % 4 // 2
        places.append(at[:, 0] * 2 + at[:, 1])
    counts = np.bincount(np.concatenate(places), minlength=4)
    assert counts.sum() == 72
    assert counts.min() > 8
    assert len({tuple(drawn) for drawn in places}) == 12
    # Every token has its place on the grid of pooled ones.
    average = embedder_of(tiny, spatial_pool_stride=2)
    ours, theirs = embedder.preprocess({"image": WIDE}), average.preprocess({"image": WIDE})
    np.testing.assert_array_equal(ours.positions, theirs.positions)


@pytest.mark.parametrize("pair", ["tiny", "windowed", "deepstack"])
def test_a_folder_says_how_its_model_pools_and_transformers_refuses_its_images(
    request, tmp_path, pair
):
    pair = request.getfixturevalue(pair)
    embedder = embedder_of(pair, spatial_pool_stride=2)
    embedder.save(tmp_path / "saved")
    again = Embedder.load(tmp_path / "saved", dtype="float32")
    assert again.config == embedder.config
    assert again.params.spatial_pool == (2, "average")
    # What transformers would pool otherwise, it does not take.
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "saved")
    inputs = dict(processor(WIDE, return_tensors="pt"))
    item = embedder.preprocess({"image": WIDE})
    counted = int(inputs["image_grid_thw"].prod()) // processor.merge_size**2
    assert counted == item.image_token_mask.sum()
    ids = torch.tensor(item.tokens[None].astype(np.int64))
    with pytest.raises(ValueError, match=r"tokens: [0-9]+, features:? [0-9]+"):
        pair.torch.model(input_ids=ids, mm_token_type_ids=ids * 0, **inputs)
    # A processor that merges otherwise than the model pools is refused.
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["puma_jax"]["images"]["spatial_pool_stride"] = 1
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"merge_size 4 is not that of config\.json, 2$"):
        open_checkpoint(tmp_path / "saved")


def test_a_fingerprint_is_that_of_before_where_nothing_is_pooled(tiny):
    assert repr(ImageConfig()) == "ImageConfig(min_pixels=3136, max_pixels=235200)"
    pooled = dataclasses.replace(ImageConfig(), spatial_pool_stride=2)
    assert repr(pooled).endswith("max_pixels=235200, spatial_pool_stride=2)")


def test_what_does_not_pool_refuses_or_says_so(tiny, tmp_path):
    embedder = embedder_of(tiny, spatial_pool_stride=2)
    message = "^images.spatial_pool_stride is 2, but Sentence Transformers does not pool visual tok"
    with pytest.raises(ConfigError, match=message):
        sentence_transformers.write(embedder, tmp_path)
    drawn = embedder_of(tiny, spatial_pool_stride=2, spatial_pool_mode="random")
    with pytest.raises(ConfigError, match=r"^visual tokens drawn at random .* export as huggingfa"):
        stablehlo.write(drawn, tmp_path)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ConfigError, match=r'^images.spatial_pool_mode "random" needs images.spati'):
        ImageConfig(spatial_pool_mode="random")
    agreement = object.__new__(Agreement)
    agreement.model = embedder
    check = agreement.check_transformers(tiny.folder, "float32")
    assert (check.verdict, check.compared) == ("not checked", 0)
    assert check.note == "transformers does not pool visual tokens (images.spatial_pool_stride 2)"
    assert "Each 2 × 2 visual tokens become their mean, which transformers" in model_card(
        embedder, "huggingface", "pooled"
    )
    assert "become one of them" in model_card(drawn, "huggingface", "drawn")
