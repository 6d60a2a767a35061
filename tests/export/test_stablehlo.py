"""The artifact gives the Embedder's vectors, where puma_jax is not installed."""

import dataclasses
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from puma_jax import Embedder
from puma_jax.config import ComputeConfig, ImageConfig, PromptConfig
from puma_jax.data import decode
from puma_jax.data.prompts import Processor, TextTruncationWarning
from puma_jax.errors import ConfigError
from puma_jax.export import loader, stablehlo
from puma_jax.model.hf import open_checkpoint
from tests.fuzz import Target, check_only_declared_errors
from tests.reference import SPECIAL, assert_full_precision, random_image

VARIANTS = {
    "as_released": (PromptConfig(), ImageConfig()),
    "bare": (PromptConfig(template="bare", positions="1d"), ImageConfig(spatial_pool_stride=2)),
}
INSTRUCTION = "find an image that matches"
# Answers pickled calls of `encode` on stdin, in a Python that cannot import ours.
WORKER = """
import pickle, sys

class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("puma_jax", "flax", "transformers", "torch", "einops"):
            raise ImportError(f"the artifact imports {name}")

sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1])
from load import Embedder

embedder = Embedder()
text = embedder.encode([{"text": "a red bicycle"}])
assert "PIL" not in sys.modules
answers = [embedder.encode(*call) for call in pickle.load(sys.stdin.buffer)]
pickle.dump([text, *answers], sys.stdout.buffer)
"""


def merging_tokenizer():
    """Bytes, and a full stop and the end of its line as one token, as Qwen's tokenizer has it."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**alphabet, ".Ċ": len(alphabet)}, [(".", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # Neither may reach the artifact, where padding would be read as text.
    backend.enable_truncation(8)
    backend.enable_padding(length=99)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def embedder_of(tiny, prompt, images=None, dtype="float32"):
    tokenizer = merging_tokenizer()
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image_token_id", "image_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
        )
    }
    images = images or ImageConfig()
    config = dataclasses.replace(tiny.config, prompt=prompt, images=images, **ids)
    checkpoint = dataclasses.replace(open_checkpoint(tiny.folder), config=config)
    params = checkpoint.read(dtype=dtype)
    return Embedder(config, params, tokenizer, compute=ComputeConfig(dtype))


@pytest.fixture(scope="module", params=VARIANTS)
def written(tiny, tmp_path_factory, request):
    """An embedder and the folder it was written to."""
    embedder = embedder_of(tiny, *VARIANTS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    stablehlo.write(embedder, folder)
    return embedder, folder


def items_of_all_kinds(folder):
    image = random_image(60, 60, seed=1)
    image.save(folder / "image.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(60, 90).save(folder / "turned.jpg", exif=exif)
    transparent = random_image(60, 90)
    transparent.putalpha(random_image(60, 90).convert("L"))
    gray = Image.fromarray(np.arange(60 * 90, dtype=np.uint16).reshape(60, 90) * 12)
    return [
        {"text": "a red bicycle"},
        {"image": random_image(90, 200)},
        {"image": np.asarray(random_image(56, 112)), "text": "make it blue"},
        {"text": "Is it <|image_pad|>?", "image": None},
        {"image": str(folder / "image.png"), "text": ""},
        {"image": folder / "image.png", "text": "as a painting"},
        {"image": random_image(200, 60).convert("L")},
        {"image": folder / "turned.jpg"},
        {"image": (folder / "turned.jpg").read_bytes()},
        {"image": transparent},
        {"image": gray},
        {"text": "two\nlines"},
    ]


def test_float32_keeps_its_bits_in_every_product(written):
    program = jax.export.deserialize((written[1] / "embed.jax").read_bytes())
    assert_full_precision(program.mlir_module())


def test_vectors_are_the_embedders_where_puma_jax_is_not_installed(written, tmp_path):
    embedder, folder = written
    items = items_of_all_kinds(tmp_path)
    calls = [(items, INSTRUCTION, 8), (items, None, 5), (items[:3], None, 2), (items[:1], None, 1)]
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-W", "error", "-c", WORKER, folder],
        input=pickle.dumps(calls), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    plain = embedder.encode(items)
    instructed = embedder.encode(items, instruction=INSTRUCTION)
    expected = [plain[:1], instructed, plain, plain[:3], plain[:1]]
    for vectors, same in zip(pickle.loads(done.stdout), expected, strict=True):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, same, rtol=0, atol=1e-5)


@pytest.mark.parametrize("instruction", [None, "", INSTRUCTION, ' "quoted"\r? '])
def test_items_are_read_as_the_embedder_reads_them(written, instruction):
    """Tokens, positions and patches are the same ones, for images of many sizes."""
    embedder, folder = written
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (2, 400), (28, 28), (56, 56), (57, 999), (1500, 1200), (448, 448)]
    sizes += np.exp(rng.uniform(2, 6.5, (12, 2))).astype(int).tolist()
    texts = ["a cat", ' "ßharp"\r\n ', "ends.", "ends!\n", "x" * 400, "<|im_end|>[RET]", "è", ""]
    items = [{"text": text} for text in texts if text]
    items += [
        {"image": random_image(*size, seed=i), "text": texts[i % len(texts)]}
        for i, size in enumerate(sizes)
    ]
    small = loader.Embedder(folder)
    template = Processor(embedder.tokenizer, embedder.config).template
    for number, item in enumerate(items):
        *read, counts = small._preprocess(number, item, instruction)
        arrays = (jax.numpy.asarray(small._padded([array])) for array in read)
        rows = stablehlo.one_item_rows(template, *arrays, jax.numpy.asarray(counts[None]))
        row = SimpleNamespace(**{name: np.asarray(value[0]) for name, value in vars(rows).items()})
        expected = embedder.preprocess(item, instruction)
        there, seen = row.segment_ids == 1, row.patch_segment_ids == 1
        np.testing.assert_array_equal(row.tokens[there], expected.tokens)
        np.testing.assert_array_equal(row.positions[there], expected.positions)
        np.testing.assert_array_equal(
            (row.image_token_index >= 0)[there], expected.image_token_mask
        )
        visual = row.image_token_index[there][expected.image_token_mask]
        np.testing.assert_array_equal(visual, np.arange(len(visual)))
        np.testing.assert_array_equal(row.patches[seen], expected.patches)
        np.testing.assert_array_equal(row.patch_positions[seen], expected.patch_positions)
        assert there[-1]
        assert row.pool_index == len(there) - 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({}, "item 1 has neither text nor image"),
        ("a cat", "item 1 has str, expected a dict of text, image or both"),
        ({"txt": "a"}, "item 1 has 'txt', expected a dict of text, image or both"),
        ({"text": 3}, "item 1: int is not a text"),
        ({"text": "ä\ud800"}, r"item 1: '\\ud800' in its text is half a character: remove it"),
        ({"text": ' "" ', "image": None}, "item 1 has neither text nor image"),
        ({"text": "x" * 460}, r"item 1: text of 46\d tokens, over 450: shorten it"),
        ({"image": ["a.png", "b.png"]}, "item 1 has 2 images, expected 1 at most"),
        ({"image": random_image(402, 2)}, r"item 1: image \(2, 402\) is over 200 : 1, crop it"),
    ],
)
def test_what_does_not_fit_is_refused(written, item, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        loader.Embedder(written[1]).encode([{"text": "good"}, item])


def test_a_call_that_means_something_else_is_refused(written):
    small = loader.Embedder(written[1])
    for items, batch_size in (("a cat", 8), ({"text": "a cat"}, 8), ([{"text": "a cat"}], -1)):
        with pytest.raises(ValueError, match="expected a list and at least 1"):
            small.encode(items, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"item 0: .* is half a character"):
        small.encode([{"text": "a cat"}], instruction="\ud800")


@pytest.mark.parametrize(
    "name", ["manifest.json", "embed.jax", "tokenizer.json", "weights.safetensors", "decode.py"]
)
def test_a_damaged_folder_is_refused_in_one_line(written, name, tmp_path):
    folder = shutil.copytree(written[1], tmp_path / "model")
    target = Target(folder / name, lambda: loader.Embedder(folder), ValueError)
    outcome = check_only_declared_errors(target, count=100 if name == "manifest.json" else 20)
    # What is left has other spaces, or is what it was.
    assert outcome.accepted < outcome.count // 10
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} cannot be read: No such file"):
        loader.Embedder(folder)


def test_a_text_is_refused_where_the_embedder_would_cut_it(written):
    embedder, folder = written
    small = loader.Embedder(folder)
    small._preprocess(0, {"text": "x" * 449}, None)
    embedder.preprocess({"text": "x" * 449})  # a warning would be an error
    with pytest.raises(ValueError, match="item 0: text of 451 tokens, over 450: shorten it"):
        small._preprocess(0, {"text": "x" * 450}, None)
    with pytest.warns(TextTruncationWarning, match="a text of 451 tokens was truncated to 450"):
        embedder.preprocess({"text": "x" * 450})


def test_few_sizes_are_compiled_and_the_largest_is_not_padded(written):
    small = loader.Embedder(written[1])
    most = 450 + len(Processor(merging_tokenizer(), written[0].config).template.suffix_both)
    padded = [small._padded([np.zeros(length)]).shape[1] for length in range(1, most + 1)]
    assert len(set(padded)) == 11
    assert all(length <= size < 2 * length + 2 for length, size in enumerate(padded, 1))
    assert padded[-1] == most
    visual = 300 // written[0].config.images.spatial_pool_stride ** 2
    assert padded[visual - 1] == visual
    assert small._padded([np.zeros((0, 7)), np.ones((2, 7))]).shape == (2, 3, 7)


def test_one_function_serves_three_platforms_and_all_sizes(written):
    exported = jax.export.deserialize((written[1] / "embed.jax").read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    instructions, tokens, blocks, sizes = exported.in_avals[-4:]
    assert [str(aval) for aval in (instructions, tokens, sizes)] == [
        "int32[batch,asked]",
        "int32[batch,words]",
        "int32[batch,4]",
    ]
    side = 28 * written[0].config.images.spatial_pool_stride
    assert str(blocks) == f"uint8[batch,visual,{side},{side},3]"
    assert str(exported.out_avals[0]) == "float32[batch,64]"


def test_the_manifest_describes_what_lies_beside_it(written):
    embedder, folder = written
    manifest = json.loads((folder / "manifest.json").read_text())
    files = ["decode.py", "embed.jax", "load.py", "tokenizer.json", "weights.safetensors"]
    assert manifest["sha256"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files
    }
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["model_type"] == "qwen2_vl"
    assert manifest["kept_layers"] == [0, 1, 2, 3]
    assert manifest["embedding_dim"] == embedder.embedding_dim
    assert manifest["dtype"] == "float32"
    stride = embedder.config.images.spatial_pool_stride
    assert manifest["max_visual_tokens"] == 300 // stride**2
    limits = {"max_text_tokens": 450, "min_pixels": 4 * 28**2, "max_pixels": 300 * 28**2}
    assert limits.items() <= manifest["preprocessing"].items()


def test_the_loader_is_copied_unchanged(written):
    assert (written[1] / "load.py").read_bytes() == Path(loader.__file__).read_bytes()
    assert (written[1] / "decode.py").read_bytes() == Path(decode.__file__).read_bytes()


def test_bfloat16_vectors_are_near_the_embedders(tiny, tmp_path):
    embedder = embedder_of(tiny, PromptConfig(), dtype="bfloat16")
    (tmp_path / "out").mkdir()
    stablehlo.write(embedder, tmp_path / "out")
    small = loader.Embedder(tmp_path / "out")
    assert {leaf.dtype.name for leaf in small.weights.values()} == {"bfloat16"}
    items = items_of_all_kinds(tmp_path)
    vectors = small.encode(items)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * embedder.encode(items)).sum(1).min() > 0.999


def test_no_items_give_no_vectors(written):
    vectors = loader.Embedder(written[1]).encode([])
    assert (vectors.shape, vectors.dtype) == ((0, 64), np.float32)


def test_without_flatbuffers_the_extra_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ConfigError, match=r"run pip install -e '\.\[export\]'"):
        stablehlo.write(embedder_of(tiny, PromptConfig()), tmp_path)
