"""What each family's tower has of its own, against transformers and PyTorch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModel
from transformers.vision_utils import get_vision_window_index

from puma_jax.data.positions import patch_positions
from puma_jax.embedder import Embedder
from puma_jax.errors import CheckpointError
from puma_jax.model import rope
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.qwen2_5_vl import window_order
from puma_jax.model.qwen3_vl import grid_sizes, interpolated
from puma_jax.rows import PackedShape
from tests import reference
from tests.reference import random_image

# Rows and columns of patches: whole windows, remainders on either side, less than a window.
GRIDS = [(16, 8), (10, 22), (4, 6), (2, 18), (8, 8), (18, 2)]


def packed(grids, padding=12):
    """The segment ids and positions of images of these grids in one row, padding behind."""
    sizes = [rows * columns for rows, columns in grids]
    starts = np.cumsum([0, *sizes[:-1]])
    ids = np.repeat(starts + 1, sizes)
    positions = np.concatenate([patch_positions(*grid, 2) for grid in grids])
    ids, positions = np.pad(ids, (0, padding)), np.pad(positions, ((0, padding), (0, 0)))
    return jnp.array(ids[None], jnp.int32), jnp.array(positions[None], jnp.int32)


@pytest.mark.parametrize("window", [112, 56, 28, 100])
def test_windows_are_those_of_the_reference(window):
    order, windows = window_order(*packed(GRIDS), window // 28 * 2)
    grid_thw = torch.tensor([[1, *grid] for grid in GRIDS])
    index, ends = get_vision_window_index(grid_thw, 2, window, 14)
    tokens = np.asarray(order)[0, ::4] // 4
    np.testing.assert_array_equal(tokens[: len(index)], index)
    ours = np.asarray(windows)[0]
    assert (ours[len(index) * 4 :] == 0).all()
    np.testing.assert_array_equal(np.flatnonzero(np.diff(ours)) + 1, ends[1:])
    assert len({*ours}) == len(ends)


def test_blocks_of_windows_and_of_whole_images(windowed):
    vision, tower = windowed.config.vision, windowed.torch.model.visual
    grids = GRIDS[:3]
    ids, positions = packed(grids, padding=0)
    order, windows = window_order(ids, positions, vision.window_size)
    x = np.random.default_rng(0).normal(size=(ids.shape[1], vision.width)).astype(np.float32)
    ordered = np.asarray(positions)[0][np.asarray(order)[0]]
    embeddings = tower.rotary_pos_emb(torch.tensor(x), torch.tensor(ordered))
    _, window_ends = get_vision_window_index(
        torch.tensor([[1, *grid] for grid in grids]), 2, 112, 14
    )
    image_ends = torch.tensor(np.cumsum([0, *(a * b for a, b in grids)]))
    angles = rope.axial_angles(jnp.array(ordered[None]), vision.head_dim, vision.rope_base)
    for number, (ends, segments) in enumerate(((window_ends, windows), (image_ends, ids))):
        theirs = tower.blocks[number](
            torch.tensor(x), cu_seqlens=ends, position_embeddings=embeddings
        )
        block = jax.tree.map(
            lambda leaf, number=number: leaf[number], windowed.params.vision.blocks
        )
        ours = block(jnp.array(x[None]), angles, segments, "xla")[0]
        np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-5)


def test_learned_positions_are_interpolated_between_the_corners_of_the_table(deepstack):
    grids = [*GRIDS, (2, 2), (60, 2)]
    ids, positions = packed(grids)
    table = deepstack.params.vision.positions.table[...]
    sizes = grid_sizes(ids, positions)
    ours = np.asarray(interpolated(table, positions, sizes))[0]
    square = torch.tensor(np.array(table)).T.reshape(1, -1, 6, 6)
    start = 0
    for rows, columns in grids:
        end = start + rows * columns
        assert (np.asarray(sizes)[0, start:end] == [rows, columns]).all()
        theirs = torch.nn.functional.interpolate(
            square, (rows, columns), mode="bilinear", align_corners=True
        )[0]
        at = torch.tensor(np.array(positions)[0, start:end])
        np.testing.assert_allclose(
            ours[start:end], theirs[:, at[:, 0], at[:, 1]].T, rtol=0, atol=2e-5
        )
        start = end


REAL = {
    "qwen2_vl": {"sections": (16, 24, 24), "mlp_ratio": 4},
    "qwen2_5_vl": {"sections": (16, 24, 24), "full": (1,), "vision_mlp_width": 3420},
    "qwen3_vl": {
        "sections": (24, 20, 20),
        "head_dim": 128,
        "deepstack": (0, 1),
        "table_side": 48,
        "vision_mlp_width": 4096,
    },
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_real_widths(family, tmp_path):
    """Two layers as wide as those of the published model of 2 or 3 billion parameters."""
    config = getattr(reference, f"{family}_config")(
        width=2048, heads=16, kv_heads=8, mlp_width=6144, layers=2,
        vision_width=1280 if family == "qwen2_5_vl" else 1024, vision_heads=16, vision_layers=2,
        **REAL[family],
    )  # fmt: skip
    pair = reference.pair(config, tmp_path / "model")
    items = [pair.item("A text."), pair.item("Both.", random_image(150, 260), random_image(90, 60))]
    ours = pair.states(items, PackedShape(2, 256, 1, 512, 2))
    for mine, item in zip(ours, items, strict=True):
        np.testing.assert_allclose(mine, pair.expected(item), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("base", "part", "change", "message"),
    [
        ("windowed", "vision_config", {"window_size": 27}, "window_size 27 is less than a visual"),
        (
            "windowed",
            "vision_config",
            {"hidden_act": "gelu"},
            'hidden_act "gelu" is not one of silu',
        ),
        ("windowed", "text_config", {"rope_parameters": {"rope_type": "yarn"}}, 'rope_type "yarn"'),
        (
            "deepstack",
            "vision_config",
            {"num_position_embeddings": 37},
            "num_position_embeddings 37 is not the size of a square",
        ),
        (
            "deepstack",
            "vision_config",
            {"deepstack_visual_indexes": [3, 1]},
            r"deepstack_visual_indexes \[3, 1\] must be blocks in ascending order",
        ),
        (
            "deepstack",
            "vision_config",
            {"deepstack_visual_indexes": [0, 4]},
            r"deepstack_blocks \(0, 4\) must name blocks below vision.layers 4",
        ),
        ("deepstack", "text_config", {"attention_bias": True}, "attention_bias true is not"),
        ("deepstack", "puma_jax", {"kept_layers": [0, 2, 1, 3]}, "do not begin with 0, 1, 2"),
    ],
)
def test_a_config_we_cannot_run_is_refused(request, tmp_path, base, part, change, message):
    folder = request.getfixturevalue(base).folder
    config = json.loads((folder / "config.json").read_text())
    config[part] = config.get(part, {}) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Embedder.load(tmp_path)


def test_a_config_of_qwen3_vl_as_on_the_hub_is_read(deepstack, tmp_path):
    folder = reference.save_folder(deepstack.torch, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config["vision_config"].pop("rope_parameters", None)
    config["vision_config"]["model_type"] = "qwen3_vl"
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).config == deepstack.config
    Embedder.load(folder, dtype="float32").keep_layers(3).save(tmp_path / "saved")
    model, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e6
