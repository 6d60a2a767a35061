"""What Sentence Transformers computes from an exported folder is what `Embedder` computes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image, ImageOps
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from puma_jax import Embedder
from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.data.prompts import query_text
from puma_jax.errors import ConfigError
from puma_jax.export.sentence_transformers import write
from puma_jax.training.config import ScratchConfig
from puma_jax.training.scratch import write_base
from tests.data import fake_mbeir
from tests.reference import SPECIAL, random_image

IMAGES = ImageConfig(max_pixels=40 * 28**2)
INSTRUCTIONS = [None, "Find an image that matches.", ' "which one is it?" ']
ITEMS = [
    {"text": "a red bicycle"},
    {"text": ' "quoted"\r\nand in <two> {{ lines }}! '},
    {"text": "Ça va? 日本 🚲"},
    {"image": random_image(20, 31)},
    {"image": random_image(300, 20), "text": "make it blue"},
    {"text": "long " * 50, "image": random_image(400, 500)},
    {"image": np.asarray(random_image(56, 84)), "text": None},
    {"text": "Compare.", "image": [random_image(60, 90), random_image(90, 56, seed=1)]},
]

pytestmark = pytest.mark.usefixtures("no_videos")


def exported(folder, **settings):
    """An embedder of a folder, and what is loaded from its export."""
    embedder = Embedder.load(folder, dtype="float32", images=IMAGES, **settings)
    out = folder.with_name(f"{folder.name}-{embedder.config.prompt.template}")
    out.mkdir()
    write(embedder, out)
    return embedder, SentenceTransformer(str(out), device="cpu"), out


@pytest.fixture(scope="module", params=["chat", "bare"])
def pair(tiny, request):
    return exported(tiny.folder, prompt=PromptConfig(template=request.param))


@pytest.fixture(scope="module", params=["chat", "bare"])
def words(request, tmp_path_factory):
    """A model whose tokenizer splits words as Qwen's does, and whose files are like its."""
    root = fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))
    folder = tmp_path_factory.mktemp("words") / "model"
    sizes = ScratchConfig(
        vocab_size=400, width=32, layers=1, heads=2, kv_heads=1, mlp_width=32,
        vision_width=32, vision_layers=1, vision_heads=2,
    )  # fmt: skip
    prompt = PromptConfig(template=request.param)
    write_base(folder, sizes, root, IMAGES, prompt, seed=0)
    hub = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": list(SPECIAL),
        "chat_template": "{{ messages }}",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(hub))
    return exported(folder)


@pytest.mark.parametrize(
    ("instruction", "batch"), [(INSTRUCTIONS[0], 7), (INSTRUCTIONS[1], 7), (INSTRUCTIONS[2], 1)]
)
def test_vectors_are_those_of_the_embedder(pair, instruction, batch):
    embedder, model, _ = pair
    vectors = model.encode(ITEMS, prompt=instruction, batch_size=batch)
    expected = embedder.encode(ITEMS, instruction=instruction)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)


def test_a_text_or_a_path_alone_is_an_item(pair, tmp_path):
    embedder, model, _ = pair
    image = tmp_path / "image.png"
    random_image(90, 60).save(image)
    vectors = model.encode(["a red bicycle", str(image)])
    expected = embedder.encode([{"text": "a red bicycle"}, {"image": image}])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)


def test_images_that_pillow_turned_are_read_as_by_the_embedder(pair, tmp_path):
    """The card says so, and what becomes of other images."""
    embedder, model, _ = pair
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = random_image(60, 90)
    transparent.putalpha(random_image(60, 90).convert("L"))
    random_image(60, 90).save(tmp_path / "turned.jpg", exif=exif)
    transparent.save(tmp_path / "both.png", exif=exif)
    transparent.save(tmp_path / "transparent.png")
    for name, as_path, as_image in (
        ("turned.jpg", True, False),
        ("both.png", False, False),
        ("transparent.png", False, True),
    ):
        path = tmp_path / name
        (expected,) = embedder.encode([{"image": path}])
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            vectors = model.encode([{"image": image} for image in (upright, str(path), opened)])
        same = np.abs(vectors - expected).max(1) < 2e-6
        assert same.tolist() == [True, as_path, as_image], name


def test_named_prompts_are_instructions(pair):
    embedder, _, folder = pair
    prompts = {"query": INSTRUCTIONS[1]}
    model = SentenceTransformer(str(folder), device="cpu", prompts=prompts)
    queries = model.encode_query(ITEMS)
    expected = embedder.encode(ITEMS, instruction=INSTRUCTIONS[1])
    np.testing.assert_allclose(queries, expected, rtol=0, atol=2e-6)
    documents = model.encode_document(ITEMS)
    np.testing.assert_allclose(documents, embedder.encode(ITEMS), rtol=0, atol=2e-6)
    assert model.similarity_fn_name == "cosine"


def assert_same_tokens(words, items, instruction):
    embedder, model, _ = words
    features = model.preprocess(items, prompt=instruction)
    for item, row, mask in zip(
        items, features["input_ids"], features["attention_mask"], strict=True
    ):
        expected = embedder.preprocess(item, instruction).tokens
        np.testing.assert_array_equal(row[mask.bool()].numpy(), expected)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_words_are_split_as_by_the_embedder(words, instruction):
    assert_same_tokens(words, ITEMS, instruction)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    instruction=st.sampled_from(INSTRUCTIONS),
)
def test_any_text_is_worded_as_by_the_embedder(words, text, instruction):
    # A line's end behind an opening quotation mark is one token with the one before the text.
    if (full := query_text(instruction, text)) and not full[0].isspace():
        assert_same_tokens(words, [{"text": text}], instruction)
    assert_same_tokens(words, [{"text": text, "image": ITEMS[3]["image"]}], instruction)


def test_there_is_one_template_and_one_padding_token(words):
    _, model, folder = words
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    assert model.tokenizer.pad_token == "<|endoftext|>"


def test_the_embedder_loads_what_it_exported(pair):
    embedder, _, folder = pair
    loaded = Embedder.load(folder, dtype="float32")
    assert loaded.config == embedder.config
    np.testing.assert_array_equal(loaded.encode(ITEMS), embedder.encode(ITEMS))


def test_tensors_are_named_as_in_the_model_that_is_opened(pair):
    _, model, folder = pair
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.transformers_model.state_dict())


def test_all_tensors_of_several_files_have_their_place(tiny, tmp_path):
    embedder = Embedder.load(tiny.folder, dtype="float32")
    embedder.save(tmp_path / "saved", max_shard_bytes=200_000, backbone=True)
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    model, report = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert set(index["weight_map"]) == set(model.state_dict())
    loaded = Embedder.load(tmp_path / "saved", dtype="float32")
    np.testing.assert_array_equal(loaded.encode(ITEMS[:2]), embedder.encode(ITEMS[:2]))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": ' "" '}, "an item has neither text nor image"),
        ({"text": ["a", "b", "c"]}, "an item is one text, images, or both"),
    ],
)
def test_what_the_embedder_would_refuse_is_refused(pair, item, message):
    with pytest.raises(TemplateError, match=message):
        pair[1].encode([item])


def test_positions_that_transformers_does_not_compute_are_refused(tiny, tmp_path):
    embedder = Embedder.load(tiny.folder, prompt=PromptConfig(positions="1d"))
    with pytest.raises(ConfigError, match=r'positions is "1d", but .* encode with puma_jax'):
        write(embedder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_writing_needs_no_torch():
    code = "import sys, puma_jax.export.sentence_transformers; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
