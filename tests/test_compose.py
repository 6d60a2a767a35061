"""A text decoder and a tower become one model, which trains, saves and loads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaModel

from puma_jax import Embedder
from puma_jax.compose import main
from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.errors import CheckpointError, ConfigError, UnknownModelError
from puma_jax.export import loader, sentence_transformers, stablehlo
from puma_jax.model import encoder
from puma_jax.model.families import family_of
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.tree import named_leaves
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.rules import shardings
from puma_jax.rows import PackedShape
from tests import reference
from tests.reference import FLOAT32, pack, pooled_features, random_image

ITEMS = ["A red bicycle.", {"text": "Blue.", "image": random_image(90, 200)}]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Folders of text decoders of 64 and 48 values, whose tokenizers know no images."""
    folders = {}
    for model_type, width in (("llama", 64), ("qwen3", 64), ("qwen2", 48)):
        config = reference.text_config(model_type, width=width)
        config.vocab_size = 257
        folders[model_type] = tmp_path_factory.mktemp(model_type) / "model"
        reference.random_model(config).save_pretrained(folders[model_type])
        tokenizer = reference.byte_tokenizer()
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["added_tokens"] = backend["added_tokens"][:1]
        (folders[model_type] / "tokenizer.json").write_text(json.dumps(backend))
    return folders


@pytest.mark.parametrize(
    ("decoder", "tower", "new"),
    [
        ("llama", "tiny", "none"),
        ("qwen3", "deepstack", "none"),
        ("qwen2", "windowed", "vision.merger"),
        ("qwen2", "deepstack", "vision.deepstack, vision.merger"),
    ],
)
def test_decoder_and_tower_are_those_of_their_models(
    decoders, request, tmp_path, capsys, decoder, tower, new
):
    vision = request.getfixturevalue(tower)
    main(str(decoders[decoder]), str(vision.folder), tmp_path / "composed")
    said = capsys.readouterr().out
    assert f"4 new rows of the token table, new weights: {new}\n" in said
    checkpoint = open_checkpoint(tmp_path / "composed")
    assert checkpoint.config.family == f"{decoder}+{vision.config.family}"
    ours = named_leaves(checkpoint.read(dtype="float32"))
    text = named_leaves(open_checkpoint(decoders[decoder]).read(dtype="float32"))
    seen = named_leaves(vision.params)
    for name, leaf in ours.items():
        if name == "decoder.embedding.table":
            np.testing.assert_array_equal(leaf[:257], text[name])
            assert len(leaf) == 261
            assert np.abs(leaf[257:].std() / leaf[:257].std() - 1) < 0.2
        elif name.startswith("decoder."):
            np.testing.assert_array_equal(leaf, text[name])
        elif not any(name.startswith(f"{part}.") for part in new.split(", ")):
            np.testing.assert_array_equal(leaf, seen[name])
    embedder = Embedder.load(tmp_path / "composed", dtype="float32")
    vectors = embedder.encode(ITEMS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    embedder.save(tmp_path / "again")
    np.testing.assert_array_equal(
        Embedder.load(tmp_path / "again", dtype="float32").encode(ITEMS), vectors
    )


def test_a_text_has_the_states_of_the_decoder_alone(decoders, tiny, tmp_path):
    main(str(decoders["llama"]), str(tiny.folder), tmp_path / "composed", ret_token="a b")
    composed = Embedder.load(tmp_path / "composed", dtype="float32")
    alone = Embedder.load(
        decoders["llama"], dtype="float32", prompt=PromptConfig(pooling="last", template="bare")
    )
    items = [alone.preprocess("A cat.")]
    rows, packing = pack(items, PackedShape(1, 128, 0, 1, 1), alone.config.vision)
    states = [
        np.asarray(encoder.encode(embedder.params, rows, FLOAT32))[packing.slot]
        for embedder in (composed, alone)
    ]
    np.testing.assert_allclose(*states, rtol=0, atol=1e-6)


def test_pooled_visual_tokens_are_those_of_the_tower_between_texts(decoders, tiny, tmp_path):
    main(str(decoders["llama"]), str(tiny.folder), tmp_path / "composed")
    images = ImageConfig(spatial_pool_stride=2)
    embedder = Embedder.load(tmp_path / "composed", dtype="float32", images=images)
    item = embedder.preprocess(ITEMS[1])
    vision, table = embedder.config.vision, embedder.params.decoder.embedding.table[...]
    (features,), _ = pooled_features(tiny.torch.model, vision, images, [ITEMS[1]["image"]])
    embeddings = torch.tensor(np.asarray(table)[item.tokens])
    embeddings[torch.tensor(item.image_token_mask)] = features
    decoder = LlamaModel.from_pretrained(decoders["llama"], dtype=torch.float32)
    with torch.no_grad():
        state = decoder(inputs_embeds=embeddings[None]).last_hidden_state[0, -1]
    theirs = torch.nn.functional.normalize(state, dim=0).numpy()
    np.testing.assert_allclose(embedder.encode([ITEMS[1]])[0], theirs, rtol=0, atol=1e-5)


def test_a_new_tower_trains(decoders, tmp_path):
    out = tmp_path / "composed"
    main(str(decoders["llama"]), "new", out, new_layers=2, new_width=32, new_heads=2, seed=1)
    images = ImageConfig(spatial_pool_stride=2)  # gradients pass through the mean
    embedder = Embedder.load(out, dtype="float32", images=images).keep_layers([0, 3])
    item = embedder.preprocess(ITEMS[1])
    rows, _ = pack([item], PackedShape(1, 256, 1, 128, 1), embedder.config.vision)

    def loss(params):
        return jnp.sum(encoder.encode(params, rows, FLOAT32)[:, 0])

    gradients = named_leaves(jax.jit(jax.grad(loss))(embedder.params))
    still = {name for name, leaf in gradients.items() if not np.abs(leaf).max()}
    assert not still
    shardings(embedder.params, make_mesh(MeshConfig(2, 2, 2), jax.devices()), embedder.config)
    main(str(decoders["llama"]), "new", out.with_name("same"), 2, 32, 2, seed=1)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out.with_name("same") / name).read_bytes() == (out / name).read_bytes()


def test_exports_of_a_composed_model(decoders, tiny, tmp_path):
    main(str(decoders["qwen3"]), str(tiny.folder), tmp_path / "composed")
    embedder = Embedder.load(tmp_path / "composed", dtype="float32")
    (tmp_path / "hlo").mkdir()
    stablehlo.write(embedder, tmp_path / "hlo")
    items = [{"text": "A red bicycle."}, ITEMS[1]]
    np.testing.assert_allclose(
        loader.Embedder(tmp_path / "hlo").encode(items), embedder.encode(items), rtol=0, atol=1e-5
    )
    with pytest.raises(ConfigError, match=r"^Sentence Transformers needs a family of transformers"):
        sentence_transformers.write(embedder, tmp_path)


def test_what_cannot_be_composed_is_refused_in_one_line(decoders, tiny, tmp_path):
    llama, out = str(decoders["llama"]), tmp_path / "out"
    with pytest.raises(
        ConfigError, match=r"^--decoder .* is a qwen2_vl with a vision tower of its"
    ):
        main(str(tiny.folder), "new", out)
    with pytest.raises(ConfigError, match=r"^--vision .* has no vision tower: give a model that"):
        main(llama, llama, out)
    for name in ("llama+qwen2", "qwen2_vl+qwen2_vl"):
        with pytest.raises(UnknownModelError, match="is not a family of texts only and one with"):
            family_of(name)
    main(llama, str(tiny.folder), out)
    config = json.loads((out / "config.json").read_text())
    for change, message in (
        ({"text_config": None}, "vocab_size is missing"),
        ({"vision_config": 3}, "vision_config 3 is not an object"),
        ({"model_type": "llama+gpt"}, '"gpt" is not one of'),
    ):
        (out / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            Embedder.load(out)
