"""Decoders without a tower: exact against transformers, and plain about images."""

import copy
import json

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.embedder import Embedder
from puma_jax.errors import CheckpointError, ImageError
from puma_jax.model.hf import open_checkpoint
from puma_jax.rows import PackedShape
from tests import reference
from tests.reference import random_image

SHAPE = PackedShape(1, 384, 0, 1, 4)
TEXTS = ["A red bicycle.", "Find it.\nA blue one.", "ß"]


@pytest.fixture(scope="module", params=reference.TEXT_CONFIGS)
def decoder(request, tmp_path_factory):
    config = reference.text_config(request.param)
    return reference.pair(config, tmp_path_factory.mktemp(request.param) / "model")


@pytest.mark.parametrize("keep", [4, 2, [0, 3, 1]])
def test_states_whole_and_sliced_and_saved(decoder, keep, tmp_path):
    chosen = list(range(keep)) if isinstance(keep, int) else keep
    model = copy.deepcopy(decoder.torch.model)
    model.layers = torch.nn.ModuleList(model.layers[index] for index in chosen)
    model.config.num_hidden_layers = len(chosen)
    model.config.layer_types = ["full_attention"] * len(chosen)
    items = [decoder.item(text) for text in TEXTS]
    embedder = Embedder.load(decoder.folder, dtype="float32").keep_layers(keep)
    embedder.save(tmp_path / "saved")
    again, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    rows, packing = reference.pack(items, SHAPE, decoder.config.vision)
    ours = np.asarray(reference.encode(embedder.params, rows, reference.FLOAT32))[packing.slot]
    for mine, item in zip(ours, items, strict=True):
        for theirs in (model, again):
            wrapped = type("Wrapped", (), {"model": theirs})
            np.testing.assert_allclose(mine, decoder.expected(item, wrapped), rtol=0, atol=1e-5)
    assert not (tmp_path / "saved/preprocessor_config.json").exists()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info


def test_an_untied_head_and_a_model_without_one_are_read(decoder, tmp_path):
    config = reference.text_config(decoder.torch.config.model_type, tie=False)
    model = reference.random_model(config)
    reference.save_folder(model, tmp_path / "untied")
    model.model.save_pretrained(tmp_path / "base")
    leaves = [open_checkpoint(tmp_path / name).read(dtype="float32") for name in ("untied", "base")]
    table = model.model.embed_tokens.weight.detach().numpy()
    for one in leaves:
        np.testing.assert_array_equal(one.decoder.embedding.table[...], table)


def test_an_image_is_refused_in_one_line(decoder):
    embedder = Embedder.load(decoder.folder)
    with pytest.raises(ImageError, match=r"^item 1: image of 30 × 20 pixels: the model has no vis"):
        embedder.encode(["A text.", {"image": random_image(20, 30)}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "llama3"}}, 'rope_type "llama3" is not one of default'),
        ({"rope_scaling": {"type": "linear"}}, 'rope_scaling.type "linear" is not one of default'),
        ({"mlp_bias": True}, "mlp_bias true is not one of False"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not one of silu'),
    ],
)
def test_what_is_not_supported_is_refused_by_name(decoder, tmp_path, change, message):
    config = json.loads((decoder.folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Embedder.load(tmp_path)


def test_the_tokenizer_of_smollm2_is_read(tmp_path):
    """It splits digits before bytes, and lacks bytes that no text needs.

    An instruction and its text are still tokenized apart.
    """
    tokenizer = reference.byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    for code in (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)):
        vocab[f"no byte {code}"] = vocab.pop(bytes_to_unicode()[code])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    read = load_tokenizer(tmp_path)
    whole = read.encode("Find 2 dogs.\nBrown ones.")
    assert whole == [*read.encode("Find 2 dogs.\n"), *read.encode("Brown ones.")]
    text = "Glacé,\tпривет, 鳥 👋🏽, \U000e0067."
    assert read.decode(read.encode(text)) == text
    vocab["no byte"] = vocab.pop(bytes_to_unicode()[0xF3])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lacks 1 of the 211 bytes"):
        load_tokenizer(tmp_path)
