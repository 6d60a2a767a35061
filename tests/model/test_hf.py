"""Hugging Face folders: read from every generation, written for today's, wrong ones named."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Qwen2VLForConditionalGeneration

from puma_jax.config import LoraConfig
from puma_jax.embedder import Embedder
from puma_jax.errors import CheckpointError, UnknownModelError
from puma_jax.model.hf import HubConfigs, open_checkpoint, write_checkpoint
from puma_jax.model.lora import add_lora
from puma_jax.model.tree import named_leaves
from tests import reference
from tests.reference import random_image


def assert_same_leaves(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def folder_of(tiny, tmp_path, **kwargs):
    return reference.save_folder(tiny.torch, tmp_path / "model", **kwargs)


def test_later_key_names_are_read(tiny, tmp_path):
    folder = reference.rename_to_later_generation(tiny.folder, tmp_path / "later")
    assert_same_leaves(open_checkpoint(folder).read(dtype="float32"), tiny.params)


def test_a_saved_base_model_is_read(tiny, tmp_path):
    tiny.torch.model.save_pretrained(tmp_path / "base")
    assert_same_leaves(open_checkpoint(tmp_path / "base").read(dtype="float32"), tiny.params)


def test_a_flat_config_as_on_the_hub_is_read(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path)
    reference.hub_config(folder)
    assert open_checkpoint(folder).config == tiny.config
    assert_same_leaves(open_checkpoint(folder).read(dtype="float32"), tiny.params)


def test_an_untied_head_is_left_where_it_is(tmp_path):
    model = reference.random_model(reference.qwen2_vl_config(tie=False))
    folder = reference.save_folder(model, tmp_path / "untied")
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    params = open_checkpoint(folder).read(dtype="float32")
    table = model.model.language_model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(named_leaves(params)["decoder.embedding.table"], table)


@pytest.mark.parametrize("keep", [4, 2, [0, 3]])
@pytest.mark.parametrize("loader", [AutoModel, Qwen2VLForConditionalGeneration])
def test_transformers_loads_what_we_save(tiny, tmp_path, keep, loader):
    embedder = Embedder.load(tiny.folder, dtype=None).keep_layers(keep)
    embedder.save(tmp_path / "saved")
    model, info = loader.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    layers = model.config.text_config.num_hidden_layers
    assert layers == embedder.config.decoder.layers == (keep if isinstance(keep, int) else 2)
    items = [tiny.item("A red bicycle."), tiny.item("Blue.", random_image(90, 200))]
    rows, packing = reference.pack(items, reference.PackedShape(2, 256, 1, 128, 2))
    ours = np.asarray(reference.encode(embedder.params, rows, reference.FLOAT32))
    wrapped = type("Wrapped", (), {"model": model if loader is AutoModel else model.model})
    for slot, item in zip(packing.slot, items, strict=True):
        np.testing.assert_allclose(ours[slot], tiny.expected(item, wrapped), rtol=0, atol=1e-4)
    assert_same_leaves(open_checkpoint(tmp_path / "saved").read(dtype="float32"), embedder.params)


def test_bfloat16_shards_with_an_index_go_round(tiny, tmp_path):
    # A copy: rounding the shared model would move every other test by its own tolerance.
    model = copy.deepcopy(tiny.torch).to(torch.bfloat16)
    folder = reference.save_folder(model, tmp_path / "model", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    embedder = Embedder.load(folder, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(embedder.params)} == {jnp.bfloat16.dtype}
    embedder.save(tmp_path / "saved", max_shard_bytes=100_000)
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 2
    loaded, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    for name, tensor in tiny.torch.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), tensor.to(torch.bfloat16)), name


def test_leaves_are_read_straight_into_their_shards(tiny):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))

    def shardings(name, leaf):
        # Shard outputs of decoder kernels, inputs of the vision tower's, nothing else.
        spec = PartitionSpec()
        if name.startswith("decoder.layers") and name.endswith("kernel"):
            spec = PartitionSpec(None, "data", "tensor")
        elif name == "vision.patch_embedding.projection.kernel":
            spec = PartitionSpec("data", "tensor")
        return NamedSharding(mesh, spec)

    params = open_checkpoint(tiny.folder).read([0, 3], dtype="float32", shardings=shardings)
    whole = open_checkpoint(tiny.folder).read([0, 3], dtype="float32")
    assert_same_leaves(params, whole)
    kernel = named_leaves(params)["decoder.layers.mlp.up.kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64 // 4, 96 // 2)


def test_layers_that_are_cut_are_not_read(tiny, tmp_path):
    """Their tensors may be garbage: nobody looks at them."""
    folder = folder_of(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith(("model.layers.2.", "model.layers.3.")):
            tensor.fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors")
    params = Embedder.load(folder, dtype="float32").keep_layers(2).params
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_all_wrong_tensors_are_listed_in_one_error(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.r_proj.weight"] = tensors.pop(
        "model.layers.0.self_attn.q_proj.weight"
    )
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert str(error.value) == (
        f"{folder}: 3 wrong tensors: model.layers.0.self_attn.q_proj.weight is missing; "
        "model.layers.0.self_attn.r_proj.weight has no place in this model; "
        "model.norm.weight has shape [3], expected [64]"
    )


def test_adapters_must_be_merged_before_they_are_saved(tiny, tmp_path):
    adapted = add_lora(tiny.params, LoraConfig(rank=2), jax.random.key(0))
    with pytest.raises(CheckpointError, match=r"lora_a has no name on disk: merge adapters"):
        write_checkpoint(tmp_path, tiny.config, adapted, HubConfigs())


def test_a_missing_shard_is_named(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path, max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 shards: {shard.name}"):
        Embedder.load(folder)


def test_a_truncated_shard_is_named_before_anything_is_read(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        Embedder.load(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "llava"}, UnknownModelError, '"llava" is not one of qwen2_vl'),
        ({"model_type": None}, UnknownModelError, '"None" is not one of qwen2_vl'),
        ({"text_config": {}}, CheckpointError, "mrope_section = none is not supported"),
        ({"use_sliding_window": True, "text_config": None}, CheckpointError, "mrope_section"),
    ],
)
def test_a_config_we_cannot_run_is_refused(tiny, tmp_path, change, error, message):
    folder = folder_of(tiny, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        Embedder.load(folder)


def test_a_place_that_is_no_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Embedder.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        Embedder.load(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder here nor available from the hub"):
        Embedder.load("nobody/no-such-model")
