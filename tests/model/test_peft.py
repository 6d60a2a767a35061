"""Adapters of PEFT: its states are ours, and what is not supported is refused in one line."""

import copy
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from puma_jax import Embedder
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.model import hf, lora
from puma_jax.model.hub_folder import UnusedWeightsWarning
from puma_jax.model.peft import open_adapter
from puma_jax.model.tree import map_named, named_leaves
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.rules import shardings
from puma_jax.rows import PackedShape
from puma_jax.training.adapter import write_adapter
from puma_jax.training.config import StageConfig
from tests.reference import FLOAT32, encode, pack, random_image

# peft asks transformers by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

QV = ["q_proj", "v_proj"]
KINDS = {
    "list": {"target_modules": QV},
    "rslora": {"target_modules": QV, "use_rslora": True},
    "pattern": {"target_modules": r".*language_model\.layers\.[02]\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"target_modules": QV, "layers_to_transform": [1, 3], "layers_pattern": "layers"},
}


def adapted(model, folder, **settings):
    """Write an adapter none of whose matrices is zero; return the model of peft."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.base_model.model


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """An adapter on the queries and values of the small model."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    adapted(tiny.torch, folder, target_modules=QV)
    return folder


def states(pair, params, item):
    shape = PackedShape(1, 128, 1, 64, 1)
    rows, packing = pack([item], shape, pair.config.vision)
    return np.asarray(encode(params, rows, FLOAT32))[packing.slot[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tiny", "deepstack"])
def test_a_merged_adapter_computes_what_peft_computes(name, kind, request, tmp_path):
    pair = request.getfixturevalue(name)
    reference = adapted(pair.torch, tmp_path, **KINDS[kind])
    embedder = Embedder.load(pair.folder, dtype="float32", adapter=tmp_path)
    item = pair.item("Make it blue.", random_image(60, 90))
    expected = pair.expected(item, reference)
    assert np.abs(expected - pair.expected(item)).max() > 1e-2
    np.testing.assert_allclose(
        states(pair, embedder.params, item), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_kept_layers_take_their_own_part_of_an_adapter(tiny, folder):
    whole = Embedder.load(tiny.folder, dtype="float32", adapter=folder)
    pruned = Embedder.load(tiny.folder, dtype="float32", adapter=folder).keep_layers([0, 2])
    expected = whole.params.decoder.layers.attention.query.kernel[np.array([0, 2])]
    np.testing.assert_array_equal(pruned.params.decoder.layers.attention.query.kernel, expected)


def test_an_adapter_merges_alike_over_a_mesh(tiny, tmp_path):
    adapted(tiny.torch, tmp_path, target_modules="all-linear")
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices())
    spread, alone = (
        Embedder.load(tiny.folder, dtype="float32", adapter=tmp_path, mesh=devices).params
        for devices in (mesh, None)
    )
    for found, expected, sharding in zip(
        *map(jax.tree.leaves, (spread, alone, shardings(spread, mesh, tiny.config))), strict=True
    ):
        assert found.sharding == sharding
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rslora"), [("tiny", True), ("windowed", False), ("deepstack", True)]
)
def test_peft_loads_what_is_trained_further(name, rslora, request, tmp_path):
    pair = request.getfixturevalue(name)
    settings = {"target_modules": r"model\.language_model\..*\.(q_proj|down_proj)"}
    adapted(pair.torch, tmp_path / "in", use_rslora=rslora, **settings)
    adapter = open_adapter(tmp_path / "in", pair.config)
    config = adapter.lora_config(dropout=0.25)
    assert (config.rank, config.dropout, config.targets) == (4, 0.25, ("query", "down"))
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = adapter.add_to(
        hf.open_checkpoint(pair.folder).read(dtype="float32"), range(4), shardings=single
    )
    params = map_named(lambda name, leaf: leaf + 0.01 * lora.is_lora(name), params)
    leaves = {name: leaf for name, leaf in named_leaves(params).items() if lora.is_lora(name)}
    stage = StageConfig(steps=1, lora=config)
    write_adapter(tmp_path / "out", pair.config, leaves, stage, str(pair.folder))

    reference = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path / "out")
    item = pair.item("Make it blue.", random_image(60, 90))
    expected = pair.expected(item, reference.base_model.model.eval())
    np.testing.assert_allclose(
        states(pair, params, item), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    again = Embedder.load(pair.folder, dtype="float32", adapter=tmp_path / "out")
    np.testing.assert_allclose(
        states(pair, again.params, item), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def changed(folder, target, change=lambda tensors: None, **fields):
    """Copy an adapter with other fields in its config, and its tensors changed in place."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, 'peft_type "LOHA" is not one of LORA; merge it with peft'),
        ({"use_dora": True}, "use_dora true is not supported: merge it with peft"),
        ({"bias": "all"}, 'bias "all" is not supported'),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save .* is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern .* is not supported"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa" is not'),
        ({"something_new": 0.5}, "something_new 0.5 is not supported"),
        ({"lora_alpha": 0}, "lora_alpha 0.0 must be above 0"),
        ({"r": 8}, r"16 wrong tensors: .* has shape \[4, 64\], expected \[8, 64\]"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tiny, folder, tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        Embedder.load(tiny.folder, adapter=changed(folder, tmp_path / "changed", **fields))


def test_every_tensor_of_an_adapter_has_a_place_and_a_partner(tiny, folder, tmp_path):
    def change(tensors):
        first, *_, last = sorted(tensors)
        tensors[first.replace("layers.0", "layers.7")] = tensors.pop(first)
        tensors[last.replace("lora_B", "lora_magnitude_vector")] = tensors[last]

    with pytest.raises(CheckpointError, match=r"^.*: 3 wrong tensors: .*no place.*no place.*half$"):
        Embedder.load(tiny.folder, adapter=changed(folder, tmp_path / "changed", change))
    (tmp_path / "changed/adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks adapter_model\.safetensors"):
        Embedder.load(tiny.folder, adapter=tmp_path / "changed")


def test_values_that_are_not_finite_are_refused(tiny, folder, tmp_path):
    def change(tensors):
        tensors[min(tensors)][0, 0] = np.nan

    embedder = Embedder.load(tiny.folder, adapter=changed(folder, tmp_path / "changed", change))
    with pytest.raises(CheckpointError, match=r"lora_A\.weight has values that are not finite"):
        embedder.fingerprint  # noqa: B018


def test_an_adapter_of_the_head_is_left_out_with_a_warning(tiny, folder, tmp_path):
    def change(tensors):
        tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((4, 64), np.float32)

    with pytest.warns(UnusedWeightsWarning, match="1 tensors of the head are not read"):
        found = Embedder.load(tiny.folder, adapter=changed(folder, tmp_path / "changed", change))
    expected = Embedder.load(tiny.folder, adapter=folder)
    assert found.fingerprint == expected.fingerprint


def test_a_stage_trains_no_adapter_of_a_tower(tiny, tmp_path):
    adapted(tiny.torch, tmp_path, target_modules=["q_proj", "qkv"])
    adapter = open_adapter(tmp_path, tiny.config)
    with pytest.raises(ConfigError, match=r"adapts vision\.blocks\.attention\.qkv, .*merge it"):
        adapter.lora_config(dropout=0.0)
