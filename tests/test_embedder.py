"""The face: one vector for each item, the same whatever stands beside it."""

import dataclasses
import random
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax import Embedder, forward
from puma_jax.config import ComputeConfig, ImageConfig
from puma_jax.errors import (
    ArtifactError,
    ConfigError,
    EvaluationError,
    ImageError,
    ItemError,
    LayerSelectionError,
)
from puma_jax.export.card import model_card
from puma_jax.forward import vectors_of_rows
from puma_jax.model.encoder import abstract
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.prune import parse_layers
from puma_jax.rows import PackedShape
from tests.reference import pack, random_image


@pytest.fixture(scope="module")
def whole(tiny):
    return Embedder.load(tiny.folder, dtype="float32")


def mixed(n, seed=0):
    """Items of all three kinds and of many sizes."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(n):
        item = {}
        if i % 3 != 1:
            item["text"] = " ".join(["word"] * int(rng.integers(1, 40)))
        if i % 3 != 0:
            item["image"] = random_image(*rng.integers(20, 200, 2).tolist(), seed=i)
        items.append(item)
    return items


def test_vectors_equal_the_reference(whole, tiny):
    image = random_image(90, 200)
    items = [{"text": "a red bicycle"}, {"image": image}, {"image": image, "text": "make it blue"}]
    vectors = whole.encode(items, instruction="Find an image that matches.")
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, whole.embedding_dim)
    same = [
        tiny.item("Find an image that matches.\na red bicycle."),
        tiny.item("Find an image that matches.", image),
        tiny.item("Find an image that matches.\nmake it blue.", image),
    ]
    for vector, item in zip(vectors, same, strict=True):
        state = tiny.expected(item)
        np.testing.assert_allclose(vector, state / np.linalg.norm(state), rtol=0, atol=1e-5)


def test_an_item_has_the_same_vector_alone_and_amid_fifty(whole):
    items = mixed(51)
    together = whole.encode(items)
    for i in (0, 1, 2, 25, 26, 50):
        alone = whole.encode([items[i]])[0]
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=1e-5)


def test_permuted_items_give_permuted_vectors(whole):
    items = mixed(40, seed=1)
    order = np.random.default_rng(0).permutation(len(items))
    permuted = whole.encode([items[i] for i in order])
    np.testing.assert_allclose(permuted, whole.encode(items)[order], rtol=0, atol=1e-5)


def test_the_size_of_chunks_changes_nothing(whole):
    items = mixed(30, seed=2)
    small = whole.encode(items, tokens_per_chunk=256)
    np.testing.assert_allclose(small, whole.encode(items), rtol=0, atol=1e-5)


@pytest.mark.parametrize("axes", [MeshConfig(), MeshConfig(2, 2, 2)])
def test_devices_that_share_the_work_give_the_same_vectors(whole, tiny, axes):
    items = mixed(30, seed=4)
    shared = Embedder.load(tiny.folder, dtype="float32", mesh=make_mesh(axes))
    np.testing.assert_allclose(shared.encode(items), whole.encode(items), rtol=0, atol=1e-5)
    assert shared.keep_layers(2).fingerprint == whole.keep_layers(2).fingerprint


def test_texts_alone_are_read_without_the_tower(whole):
    items = mixed(30, seed=5)
    shape = whole.shape_for([whole.preprocess(item) for item in items])
    assert shape.patch_rows
    texts = [item for item in items if "image" not in item]
    expected = whole.encode(items)[[i for i, item in enumerate(items) if "image" not in item]]
    np.testing.assert_allclose(whole.encode(texts, shape=shape), expected, rtol=0, atol=1e-5)


def test_fingerprints_tell_models_apart(whole, tiny):
    same = Embedder.load(tiny.folder, dtype="float32")
    assert whole.fingerprint == same.fingerprint
    images = ImageConfig(max_pixels=100 * 28**2)
    others = [
        whole.keep_layers(2),
        whole.keep_layers([0, 1, 3, 2]),
        Embedder.load(tiny.folder, dtype="float32", images=images),
    ]
    assert len({whole.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_long_jobs_compile_one_shape(whole):
    items = mixed(400, seed=3)
    before = forward.vectors_of_rows()._cache_size()
    whole.encode((item for item in items), tokens_per_chunk=1024, progress=False)
    assert forward.vectors_of_rows()._cache_size() <= before + 1


def test_bfloat16_weights_are_never_widened_all_at_once(tiny):
    """On a CPU, XLA would keep a float32 copy of every layer while it embeds."""
    rows, _ = pack([tiny.item("A.", random_image(60, 60))], PackedShape(1, 128, 1, 64, 1))

    def memory(layers):
        params = abstract(tiny.config.with_layers(tuple(range(layers))), "bfloat16")
        compiled = forward.vectors_of_rows().lower(params, rows, ComputeConfig(), 1).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(64) < 1.1 * memory(4)


def test_no_items_give_no_vectors(whole):
    assert whole.encode([]).shape == (0, whole.embedding_dim)


def test_keeping_layers_before_and_after_reading_is_the_same(whole, tiny):
    items = mixed(5)
    lazily = Embedder.load(tiny.folder, dtype="float32").keep_layers([0, 1, 3]).keep_layers(2)
    assert whole.params is not None
    cut = whole.keep_layers([0, 1, 3]).keep_layers(2)
    assert lazily.config == cut.config
    np.testing.assert_array_equal(lazily.encode(items), cut.encode(items))


def test_saved_and_loaded_it_gives_the_same_vectors(whole, tmp_path):
    items = mixed(5)
    cut = whole.keep_layers([0, 3])
    cut.save(tmp_path / "saved")
    loaded = Embedder.load(tmp_path / "saved", dtype=None)
    assert loaded.config == cut.config
    np.testing.assert_array_equal(loaded.encode(items), cut.encode(items))
    with pytest.raises(ArtifactError, match="is not empty: choose another folder, or remove it"):
        cut.save(tmp_path / "saved")


def test_first_values_are_scaled_to_length_one_and_trained_widths_are_remembered(tiny, tmp_path):
    embedder = Embedder.load(tiny.folder, dtype="float32")
    items, before = mixed(6), embedder.fingerprint
    vectors = embedder.encode(items)
    for width in (1, 24, 64):
        expected = np.array([v[:width] / np.linalg.norm(v[:width]) for v in vectors])
        found = embedder.encode(items, dimensions=width)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(embedder.encode(items, dimensions=64), vectors)
    for width in (0, 65):
        with pytest.raises(ConfigError, match=rf"dimensions {width} must be in \[1, 64\]"):
            embedder.encode(items, dimensions=width)
    embedder.config = dataclasses.replace(embedder.config, widths=(8, 24))
    embedder.keep_layers(2).save(tmp_path / "saved")
    loaded = Embedder.load(tmp_path / "saved")
    assert loaded.config.widths == (8, 24)
    assert "first 8, 24 values" in model_card(loaded, "huggingface", "model")
    # Vectors do not depend on the widths, and what is made of vectors does not either.
    again = Embedder(embedder.config, embedder.params, embedder.tokenizer)
    assert again.fingerprint == before


def test_saving_leaves_what_lies_beside_alone(whole, tmp_path):
    beside = tmp_path / "mine.partial"
    beside.mkdir()
    (beside / "notes.txt").write_text("mine")
    whole.keep_layers(1).save(tmp_path / "mine")
    assert (beside / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.partial"]
    with pytest.raises(ArtifactError, match=r"notes.txt is a file"):
        whole.save(beside / "notes.txt" / "model")


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tiny, tmp_path):
    code = f"""
import resource
from puma_jax import Embedder
from puma_jax.errors import ArtifactError
embedder = Embedder.load({str(tiny.folder)!r}, dtype=None)
for limit in (100, 10_000, 400_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        embedder.save({str(tmp_path / "out")!r})
    except ArtifactError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all("cannot be written: " in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_is_not_supported_is_named_with_those_that_are(tiny):
    code = f"""
from puma_jax import Embedder
from puma_jax.errors import ConfigError
for dtype in ("float16", "bf16"):
    try:
        Embedder.load({str(tiny.folder)!r}, dtype=dtype)
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        'dtype "float16" is not one of float32, bfloat16',
        'dtype "bf16" is not one of float32, bfloat16',
    ]


def test_a_model_without_a_spare_row_is_read_with_a_token_that_it_has(tiny, tmp_path):
    embedder = Embedder.load(tiny.folder, dtype="float32", ret_token="<|video_pad|>").keep_layers(1)
    vector = embedder.encode([{"text": "A."}])
    embedder.save(tmp_path / "saved")
    saved = Embedder.load(tmp_path / "saved", dtype="float32")
    assert saved.config.prompt.ret_token == "<|video_pad|>"
    np.testing.assert_array_equal(saved.encode([{"text": "A."}]), vector)


def test_bfloat16_vectors_stay_near(whole, tiny):
    items = mixed(6)
    half = Embedder.load(tiny.folder, dtype="bfloat16").encode(items)
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)
    assert (half * whole.encode(items)).sum(1).min() > 0.99


def test_an_instruction_that_is_no_unicode_is_refused(tiny):
    embedder = Embedder.load(tiny.folder, dtype="float32")
    with pytest.raises(ItemError, match="item 0: instruction is not valid Unicode: surrogates"):
        embedder.encode([{"text": "a red bicycle"}], instruction="\ud800")


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ({}, ItemError, "item 1: neither text nor image"),
        ({"text": None, "image": None}, ItemError, "item 1: neither text nor image"),
        ({"text": "  "}, ItemError, "item 1: an item has neither text nor image"),
        ({"text": 3}, ItemError, "item 1: text is a int, expected a str"),
        ({"text": "\ud800"}, ItemError, "item 1: text is not valid Unicode"),
        ({"txt": "a"}, ItemError, r"item 1: unknown fields \['txt'\], expected text, image, video"),
        ({"image": "no.jpg"}, ImageError, "item 1: no.jpg does not exist"),
        ({"image": b"nonsense"}, ImageError, "item 1: image cannot be decoded"),
        ({"image": 3}, ImageError, "item 1: image is a int, expected a path, bytes"),
    ],
)
def test_a_bad_item_is_named(whole, item, error, message):
    with pytest.raises(error, match=message):
        whole.encode([{"text": "good"}, item])


def test_prune_cuts_from_the_shell(tiny, tmp_path):
    command = [sys.executable, "-m", "puma_jax.prune", "--model", str(tiny.folder)]
    out = tmp_path / "pruned"
    done = subprocess.run(
        [*command, "--keep-layers", "0-1,3", "--out", str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"Kept layers 0, 1, 3. The model is in {out}"
    assert Embedder.load(out).config.kept_layers == (0, 1, 3)
    failed = subprocess.run(
        [*command, "--keep-layers", "9", "--out", str(tmp_path / "other")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1] == (
        "error: keep_layers 9 is out of range: the model has 4 layers"
    )


def test_layers_are_named_by_count_index_or_range():
    assert parse_layers("12") == 12
    assert parse_layers("0-3,27") == [0, 1, 2, 3, 27]
    assert parse_layers("5,") == [5]
    for text in ("all", "3-1", "0,5-3", "0-1000000000000", "-1"):
        with pytest.raises(LayerSelectionError, match=f'"{text}" is neither a number'):
            parse_layers(text)


def test_model_and_losses_need_nothing_but_the_core():
    """They run where nothing is installed but jax, flax, numpy, safetensors and einops."""
    code = """
import sys
for missing in ("PIL", "tqdm", "tyro", "array_record", "tensorflow_datasets", "jaxtyping",
                "beartype", "huggingface_hub", "tokenizers"):
    sys.modules[missing] = None
import jax, jax.numpy as jnp
from puma_jax.config import ComputeConfig, DecoderConfig, LoraConfig, ModelConfig, VisionConfig
from puma_jax.losses import mac_loss
from puma_jax.model import encoder, hf, lora
from puma_jax.rows import PackedBatch
vision = VisionConfig(layers=1, width=16, heads=2, mlp_width=16, out_width=16)
decoder = DecoderConfig(99, 16, 2, 2, 1, 8, 16, mrope_section=(2, 1, 1))
config = ModelConfig("qwen2_vl", vision, decoder, 1, 2, 3)
params = lora.add_lora(encoder.init(config, jax.random.key(0)), LoraConfig(2), jax.random.key(1))
ones = lambda *shape: jnp.ones(shape, jnp.int32)
patches = ones(1, 4, 588).astype(jnp.uint8)
rows = PackedBatch(ones(2, 8), ones(2, 8), ones(2, 8, 3), -ones(2, 8), patches,
                   ones(1, 4), ones(1, 4, 2), jnp.arange(4))
vectors = encoder.l2_normalize(encoder.encode(params, rows, ComputeConfig("float32")))
print(float(mac_loss(vectors, vectors, ones(4), tau_norm=0.03, tau_hard=0.02)) > 0)
assert not {"torch", "tensorflow"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_importing_the_package_brings_neither_torch_nor_tensorflow():
    code = (
        "import sys, puma_jax.embedder, puma_jax.prune, puma_jax.model.lora;"
        "print([m for m in ('torch', 'tensorflow', 'tensorflow_datasets')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_texts_are_items_and_a_single_item_is_refused_with_a_word(tiny):
    embedder = Embedder.load(tiny.folder, dtype="float32")
    same = embedder.encode(["a red bicycle", {"text": "a red bicycle"}], progress=False)
    np.testing.assert_allclose(same[0], same[1], rtol=0, atol=1e-6)
    for single in ("a red bicycle", {"text": "a red bicycle"}):
        with pytest.raises(ItemError, match=r"takes a list of items .* encode\(\[item\]\)\[0\]"):
            embedder.encode(single)


def test_vectors_that_say_nothing_are_errors(tiny):
    embedder = Embedder.load(tiny.folder, dtype="float32")
    scale = embedder.params.decoder.norm.scale
    for value, what in ((0.0, "zero"), (np.nan, "not finite")):
        embedder.params.decoder.norm.scale = type(scale)(jnp.full_like(scale[...], value))
        with pytest.raises(EvaluationError, match=f"2 of 2 vectors are {what}, .* of item 0: look"):
            embedder.encode(["a", "b"], progress=False)


def test_calls_of_few_items_settle_on_few_programs(whole):
    """200 calls of random sizes share few shapes, each a program, and the last 100 need no more."""
    for seed in range(3):
        chance, counts = random.Random(seed), []
        calls = forward.Forward(whole.params, whole.config.vision, ComputeConfig(), None)
        for _ in range(200):
            items = []
            for _ in range(chance.randint(2, 39)):
                words = chance.randint(1, 40) if chance.random() < 0.7 else 0
                image = not words or chance.random() < 0.4
                patches = chance.choice([24, 64]) if image else 0
                items.append((12 + 2 * words + patches // 4, patches))
            calls._shape(*np.array(items).T, 2048)
            counts.append(len(calls.known_shapes))
        assert counts[99] == counts[-1] <= 4


def test_few_texts_alone_take_the_program_of_images(tiny, whole):
    embedder, texts = Embedder.load(tiny.folder, dtype="float32"), ["red", "a red bicycle"]
    embedder.encode([{"text": "red", "image": random_image(60, 60)}], progress=False)
    found = embedder.encode(texts, progress=False)
    assert len(embedder._known_shapes) == 1
    np.testing.assert_allclose(found, whole.encode(texts, progress=False), rtol=0, atol=1e-6)


def test_calls_of_one_shape_share_a_program(tiny):
    embedder, programs = Embedder.load(tiny.folder, dtype="float32"), vectors_of_rows()
    before = programs._cache_size()
    for count in range(2, 12):
        embedder.encode(["red bicycle"] * count, progress=False)
    assert programs._cache_size() - before <= len(embedder._known_shapes) <= 2
