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
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from puma_jax.config import LoraConfig
from puma_jax.embedder import Embedder
from puma_jax.errors import CheckpointError, UnknownModelError
from puma_jax.model.hf import HubConfigs, open_checkpoint, write_checkpoint
from puma_jax.model.hub_folder import UnusedWeightsWarning
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


def test_a_saved_base_model_is_read(family, tmp_path):
    family.torch.model.save_pretrained(tmp_path / "base")
    assert_same_leaves(open_checkpoint(tmp_path / "base").read(dtype="float32"), family.params)


@pytest.mark.parametrize("base", ["tiny", "windowed"])
def test_a_flat_config_as_on_the_hub_is_read(base, tmp_path, request):
    pair = request.getfixturevalue(base)
    folder = folder_of(pair, tmp_path)
    reference.hub_config(folder)
    assert open_checkpoint(folder).config == pair.config
    assert_same_leaves(open_checkpoint(folder).read(dtype="float32"), pair.params)
    Embedder.load(folder, dtype="float32").save(tmp_path / "saved")
    _, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_untied_head_is_left_where_it_is(family, tmp_path):
    model = reference.random_model(getattr(reference, f"{family}_config")(tie=False))
    folder = reference.save_folder(model, tmp_path / "untied")
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    params = open_checkpoint(folder).read(dtype="float32")
    table = model.model.language_model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(named_leaves(params)["decoder.embedding.table"], table)


@pytest.mark.parametrize("keep", [4, 2, [0, 1, 2], [0, 3]])
@pytest.mark.parametrize("loader", [AutoModel, AutoModelForImageTextToText])
def test_transformers_loads_what_we_save(family, tmp_path, keep, loader):
    if keep == [0, 3] and family.config.vision.deepstack_blocks:
        pytest.skip("DeepStack feeds layer 1")
    embedder = Embedder.load(family.folder, dtype=None).keep_layers(keep)
    embedder.save(tmp_path / "saved")
    model, info = loader.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    layers = model.config.text_config.num_hidden_layers
    assert (
        layers == embedder.config.decoder.layers == (keep if isinstance(keep, int) else len(keep))
    )
    items = [family.item("A red bicycle."), family.item("Blue.", random_image(90, 200))]
    shape = reference.PackedShape(2, 256, 1, 128, 2)
    rows, packing = reference.pack(items, shape, family.config.vision)
    ours = np.asarray(reference.encode(embedder.params, rows, reference.FLOAT32))
    wrapped = type("Wrapped", (), {"model": model if loader is AutoModel else model.model})
    for slot, item in zip(packing.slot, items, strict=True):
        np.testing.assert_allclose(ours[slot], family.expected(item, wrapped), rtol=0, atol=1e-5)
    assert_same_leaves(open_checkpoint(tmp_path / "saved").read(dtype="float32"), embedder.params)


def test_bfloat16_shards_with_an_index_go_round(family, tmp_path):
    # A copy: rounding the shared model would move every other test by its own tolerance.
    model = copy.deepcopy(family.torch).to(torch.bfloat16)
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
    for name, tensor in family.torch.model.named_parameters():
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
        ({"text_config": {}}, CheckpointError, "config.json: vocab_size is missing"),
        ({"text_config": 3}, CheckpointError, "config.json: text_config 3 is not an object"),
        ({"image_token_id": 272}, CheckpointError, "image_token_id 272 is beyond the 272 rows"),
        ({"image_token_id": -1}, CheckpointError, r"image_token_id -1 must be in \[0, "),
        (
            {"puma_jax": {"prompt": {"positions": "x"}}},
            CheckpointError,
            'config.json: puma_jax.prompt.positions "x" is not one of mrope, 1d',
        ),
        ({"puma_jax": {"prompt": {"max_text_tokens": -1}}}, CheckpointError, "max_text_tokens -1"),
        ({"puma_jax": {"images": {"min_pixels": 10**9}}}, CheckpointError, "min_pixels 1000000000"),
        ({"puma_jax": {"kept_layers": [0]}}, CheckpointError, "kept_layers names 1 layers"),
    ],
)
def test_a_config_we_cannot_run_is_refused(tiny, tmp_path, change, error, message):
    folder = folder_of(tiny, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        Embedder.load(folder)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"rope_parameters": {}}, "mrope_section is missing: only M-RoPE"),
        (
            "text_config",
            {"use_sliding_window": True},
            "use_sliding_window true is not one of False",
        ),
        ("text_config", {"hidden_act": "gelu"}, 'hidden_act "gelu" is not one of silu'),
        ("text_config", {"num_hidden_layers": 10**9}, r"num_hidden_layers 1000000000 must be in"),
        (
            "text_config",
            {"num_attention_heads": 3},
            "64 is not a multiple of num_attention_heads 3",
        ),
        ("text_config", {"rms_norm_eps": 0}, "rms_norm_eps 0.0 must be above 0"),
        ("vision_config", {"depth": 10**9}, r"vision_config.depth 1000000000 must be in \[1, 1024"),
        ("vision_config", {"in_channels": 4}, "in_channels 4 is not one of 3"),
        ("vision_config", {"mlp_ratio": 0}, "mlp_ratio 0 must be in"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_sized_by_it(
    tiny, tmp_path, part, change, message
):
    config = json.loads((tiny.folder / "config.json").read_text())
    config[part] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Embedder.load(tmp_path)


def test_settings_of_images_come_from_the_file_that_transformers_prefers(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path)
    for name, mean, nested in (
        ("preprocessor_config.json", 0.25, False),
        ("processor_config.json", 0.5, True),
    ):
        settings = {"image_mean": [mean] * 3, "image_std": [0.5] * 3}
        value = {"image_processor": settings} if nested else settings
        (folder / name).write_text(json.dumps(value))
        theirs = Qwen2VLImageProcessorPil.from_pretrained(folder).image_mean
        assert open_checkpoint(folder).config.vision.image_mean == tuple(theirs) == (mean,) * 3
    # A processor_config.json of older releases says nothing of images.
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "x"}))
    assert open_checkpoint(folder).config.vision.image_mean == (0.25,) * 3
    embedder = Embedder.load(folder, dtype=None).keep_layers(1)
    embedder.save(tmp_path / "saved")
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "saved")
    assert [*theirs.image_mean, *theirs.image_std] == [0.25] * 3 + [0.5] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": [0.5, 0.5, 0]}, r"image processor: image_std\[2\] 0.0 must be above 0"),
        ({"image_mean": [0.5]}, "image_mean .* is not a list of 3"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0 is not supported"),
        ({"do_normalize": False}, "do_normalize false is not one of True"),
        ({"resample": 2}, "resample 2 is not one of 3"),
        ({"patch_size": 16}, "patch_size 16 is not that of config.json, 14"),
    ],
)
def test_images_that_would_be_prepared_otherwise_are_refused(tiny, tmp_path, settings, message):
    (tmp_path / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        Embedder.load(tmp_path)


def test_a_single_file_comes_before_an_index_and_what_lies_unused_is_named(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path, max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    tensors = load_file(tiny.folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((64,), 3.0)
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UnusedWeightsWarning, match=rf"{shards[0]}.* are not read, the model is in "):
        checkpoint = open_checkpoint(folder)
    scale = named_leaves(checkpoint.read(dtype="float32"))["decoder.norm.scale"]
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder).model.language_model.norm
    np.testing.assert_array_equal(scale, theirs.weight.detach().numpy())
    assert scale[0] == 3
    for name in shards:
        (folder / name).unlink()
    open_checkpoint(folder)  # an index without its files does not matter beside a whole model


def test_an_index_names_files_beside_it_alone(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r'"../model.safetensors" is not the name of a file'):
        Embedder.load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_codes_are_refused_by_name_and_dtype(tiny, tmp_path, dtype):
    folder = folder_of(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 wrong tensors: {name} is of dtype [A-Z0-9_]+, "):
        Embedder.load(folder)


@pytest.mark.parametrize(
    ("stored", "value", "dtype", "message"),
    [
        (torch.float64, 1e300, "float32", "has values too large for float32"),
        (torch.float32, 3.4e38, "bfloat16", "has values too large for bfloat16"),
        (torch.float32, torch.nan, "float32", "has values that are not finite"),
        (torch.bfloat16, torch.inf, "bfloat16", "has values that are not finite"),
        (torch.bfloat16, -torch.inf, "float32", "has values that are not finite"),
    ],
)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "visual.merger.ln_q.bias"])
def test_a_weight_that_is_not_finite_in_memory_is_named(
    tiny, tmp_path, name, stored, value, dtype, message
):
    folder = folder_of(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(stored)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        open_checkpoint(folder).read(dtype=dtype)


def test_a_tensor_under_two_names_is_refused(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.norm.weight"] = torch.zeros(64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight is there twice"):
        Embedder.load(folder)


def test_a_place_that_is_no_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Embedder.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        Embedder.load(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder here nor available from the hub"):
        Embedder.load("nobody/no-such-model")


@pytest.mark.parametrize(
    "location",
    [
        "../mac",
        "./x",
        "x",
        "/x/y",
        "a/b--c",
        "a/b..c",
        "a/.b",
        "~nobody/x",
        "a/b/c",
        "x" * 3000,
        "é/b",
    ],
)
def test_what_looks_like_a_path_never_goes_to_the_hub(monkeypatch, location):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Embedder.load(location)


def test_an_adapter_and_weights_of_pytorch_are_told_apart_from_models(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2-VL"}')
    with pytest.raises(
        CheckpointError, match='an adapter of PEFT for "Qwen/Qwen2-VL", not a model'
    ):
        Embedder.load(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights of PyTorch \(.bin\), not safetensors"):
        Embedder.load(tmp_path)
