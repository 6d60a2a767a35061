"""Exports of every family and pooling give the vectors of the embedder they were made of."""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from puma_jax import Embedder
from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.errors import ConfigError
from puma_jax.export import loader, sentence_transformers, stablehlo
from puma_jax.export.card import model_card
from tests import reference
from tests.reference import random_image

ITEMS = [
    {"text": "A red bicycle."},
    {"text": "Make it blue.", "image": random_image(90, 300)},
    {"image": random_image(200, 70)},
]


@pytest.fixture(params=[("windowed", "ret"), ("deepstack", "ret"), ("tiny", "mean")])
def embedder(request, tmp_path_factory):
    name, pooling = request.param
    side = request.getfixturevalue(name).config.vision.patch_size * 2
    folder = request.getfixturevalue(name).folder
    if pooling == "mean":  # as such models often do, it attends both ways
        both_ways = tmp_path_factory.mktemp("both-ways") / "model"
        folder = reference.bidirectional_copy(folder, both_ways)
    return Embedder.load(
        folder,
        dtype="float32",
        images=ImageConfig(4 * side**2, 40 * side**2),
        prompt=PromptConfig(pooling=pooling),
    )


def test_stablehlo_computes_the_same_vectors(embedder, tmp_path):
    stablehlo.write(embedder, tmp_path)
    alone = loader.Embedder(tmp_path)
    np.testing.assert_allclose(alone.encode(ITEMS), embedder.encode(ITEMS), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("no_videos")
def test_sentence_transformers_computes_the_same_vectors(embedder, tmp_path):
    sentence_transformers.write(embedder, tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(model.encode(ITEMS), embedder.encode(ITEMS), rtol=0, atol=1e-5)


def test_the_card_says_how_vectors_are_pooled(embedder):
    said = {"ret": "pooled at `[RET]`", "mean": "pooled by the mean over all tokens"}
    card = model_card(embedder, "huggingface", "model")
    assert said[embedder.config.prompt.pooling] in card


def test_a_model_of_texts_only_is_refused_in_one_line(tmp_path):
    model = reference.random_model(reference.text_config("llama", layers=1))
    embedder = Embedder.load(reference.save_folder(model, tmp_path / "llama"))
    for export in (stablehlo, sentence_transformers):
        with pytest.raises(ConfigError, match=r"^a model of texts only is not supported .*hugging"):
            export.write(embedder, tmp_path)
