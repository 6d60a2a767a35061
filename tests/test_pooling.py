"""Prompts and poolings beside PUMA's: as published, saved with the model, the same in training."""

import json
import unicodedata

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import processors

from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.data.prompts import Processor
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError, ItemError
from puma_jax.export import loader, sentence_transformers, stablehlo
from puma_jax.model.hf import open_checkpoint
from puma_jax.rows import PackedShape
from tests import reference
from tests.reference import FLOAT32, encode, image_processor, pack, random_image

LIMITS = ImageConfig(4 * 32**2, 60 * 32**2)


@pytest.fixture(scope="module")
def published(deepstack, tmp_path_factory):
    """A folder as that of Qwen3-VL-Embedding: its tokenizer ends every text with a token."""
    folder = tmp_path_factory.mktemp("published") / "Qwen3-VL-Embedding-tiny"
    reference.save_folder(deepstack.torch, folder)
    tokenizer = reference.byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def published_vector(deepstack, folder, text=None, image=None, instruction=None):
    """The vector by the published procedure, written with transformers and nothing of ours."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    instruction = (instruction or "Represent the user's input.").strip()
    if not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    inputs, pictures = {}, ""
    if image is not None:
        vision = deepstack.config.vision
        inputs = dict(image_processor(LIMITS, vision)(image, return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            count = int(grid.prod()) // 4
            pictures += f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
    elif not text:
        text = "NULL"
    prompt = (
        f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{pictures}{text or ''}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    with torch.no_grad():
        states = deepstack.torch.model(
            input_ids=ids, mm_token_type_ids=(ids == image_id).long(), **inputs
        ).last_hidden_state
    return torch.nn.functional.normalize(states[:, -1], dim=-1)[0].numpy()


CASES = {
    "text": {"text": "a red bicycle"},
    "line breaks first": {"text": "\n\n a red bicycle\n"},
    "empty": {"text": ""},
    "image": {"image": random_image(90, 200)},
    "both": {"text": " Make it blue", "image": random_image(70, 60, seed=1)},
    "several images": {"text": "b", "image": [random_image(60, 90), random_image(80, 40, seed=2)]},
    "instructed": {"text": "a cat", "instruction": " Find it! "},
    "instructed without an end": {"text": "ein Hund?", "instruction": "Find it"},
    "all": {"text": "x", "image": random_image(64, 64), "instruction": "Find 「this」"},
}


def test_a_published_embedder_gives_its_own_vectors_without_settings(deepstack, published):
    embedder = Embedder.load(published, dtype="float32", images=LIMITS)
    assert embedder.config.prompt.pooling == "last"
    ours = embedder.encode(list(CASES.values()))
    for name, mine in zip(CASES, ours, strict=True):
        theirs = published_vector(deepstack, published, **CASES[name])
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5, err_msg=name)
    alone = embedder.encode([{"text": "a cat"}], instruction="Find it!")[0]
    np.testing.assert_allclose(alone, list(ours)[6], rtol=0, atol=1e-5)
    assert embedder.tokenizer.decode(embedder.preprocess("a").tokens[-1:]) == "<|endoftext|>"


def test_it_is_recognized_by_its_pooling_or_its_name_and_a_base_model_is_none(published, tmp_path):
    images = ImageConfig(4 * 32**2, 1800 * 32**2)
    config = open_checkpoint(published).config
    assert config.prompt == PromptConfig(template="instruct", pooling="last", max_text_tokens=8192)
    assert config.images == images
    (tmp_path / "base").symlink_to(published)
    assert open_checkpoint(tmp_path / "base").config.prompt == PromptConfig()
    folder = tmp_path / "trained-by-somebody"
    folder.mkdir()
    for file in published.iterdir():
        (folder / file.name).symlink_to(file)
    assert open_checkpoint(folder).config.prompt == PromptConfig()
    (folder / "1_Pooling").mkdir()
    for pooling, expected in (
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_mean_tokens": True}, "ret"),
    ):
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
        assert open_checkpoint(folder).config.prompt.pooling == expected


def test_a_saved_embedder_says_how_it_is_prompted_and_pooled(published, tmp_path):
    embedder = Embedder.load(published, dtype="float32", images=LIMITS).keep_layers(3)
    embedder.save(tmp_path / "saved")
    again = Embedder.load(tmp_path / "saved", dtype="float32")
    assert again.config == embedder.config
    assert len(again.tokenizer) == len(reference.byte_tokenizer())  # no [RET]
    items = list(CASES.values())
    np.testing.assert_array_equal(again.encode(items), embedder.encode(items))


@pytest.mark.parametrize("template", ["chat", "bare"])
def test_mean_pooling_is_the_mean_of_the_reference(family, template):
    prompt = PromptConfig(template=template, pooling="mean")
    embedder = Embedder.load(family.folder, dtype="float32", prompt=prompt)
    assert embedder.params.mean_pooling
    raw = ["A cat.", {"text": "Blue.", "image": random_image(60, 90)}, "A dog and a cat."]
    items = [embedder.preprocess(item) for item in raw]
    shape = PackedShape(4, 256, 2, 128, 8, data_shards=2)
    rows, packing = pack(items, shape, family.config.vision)
    ours = np.asarray(encode(embedder.params, rows, FLOAT32, data_shards=2))[packing.slot]
    for mine, item in zip(ours, items, strict=True):
        theirs = family.all_states(item).mean(0)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.encode(raw), unit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "windowed", "deepstack", "llama"])
def test_attention_both_ways_is_that_of_the_reference(request, name, tmp_path, monkeypatch):
    if name == "llama":
        pair = reference.pair(reference.text_config("llama"), tmp_path / "llama")
    else:
        pair = request.getfixturevalue(name)
    folder = reference.bidirectional_copy(pair.folder, tmp_path / "both-ways")
    prompt = PromptConfig(template="bare", pooling="mean")
    embedder = Embedder.load(folder, dtype="float32", prompt=prompt)
    assert not embedder.config.decoder.causal
    raw = ["A cat.", "A dog and a cat."]
    if pair.config.vision.layers:
        raw.append({"text": "Blue.", "image": [random_image(60, 90), random_image(90, 60)]})
    ours = embedder.encode(raw)
    monkeypatch.setattr(pair.torch.config.get_text_config(), "is_causal", False, raising=False)
    for mine, item in zip(ours, raw, strict=True):
        theirs = pair.all_states(embedder.preprocess(item)).mean(0)
        np.testing.assert_allclose(mine, theirs / np.linalg.norm(theirs), rtol=0, atol=1e-5)
    causal = Embedder.load(pair.folder, dtype="float32", prompt=prompt)
    assert np.abs(causal.encode(raw[:2]) - ours[:2]).max() > 1e-2
    embedder.keep_layers(3).save(tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").config == embedder.keep_layers(3).config


@pytest.mark.parametrize("template", ["chat", "bare"])
def test_the_last_token_of_other_prompts(tiny, template):
    prompt = PromptConfig(template=template, pooling="last")
    embedder = Embedder.load(tiny.folder, dtype="float32", prompt=prompt)
    item = embedder.preprocess("A cat.")
    assert "[RET]" not in embedder.tokenizer.get_vocab()
    theirs = tiny.all_states(item)[-1]
    ours = embedder.encode(["A cat."])[0]
    np.testing.assert_allclose(ours, theirs / np.linalg.norm(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("text", ["a cat", "\na cat", None])
@pytest.mark.parametrize("instruction", ["Find it", None])
def test_training_reads_items_as_embedding_does(published, image, text, instruction):
    checkpoint = open_checkpoint(published)
    embedder = Embedder.load(published)
    processor = Processor(embedder.tokenizer, checkpoint.config)
    raw = {"text": text, "image": random_image(64, 96)} if image else {"text": text or ""}
    expected = embedder.preprocess(raw, instruction)
    images = [(expected.patches, (4, 6))] if image else []
    before = ()
    if instruction is None:
        body = processor.tokenize_text(processor.read(text), image=image)
        tokens = body.tokens
    else:
        before = processor.tokenize_instruction(instruction)
        read = processor.read_after_instruction(text)
        body = processor.tokenize_text(read, image=image, instructed=True)
        tokens = processor.template.join(before, body, image=image)
    item = processor.template.assemble(tokens, images, instruction=len(before))
    np.testing.assert_array_equal(item.tokens, expected.tokens)
    lengths = [np.array([n]) for n in (len(before), len(body.tokens), body.text_length)]
    added = processor.template.joined_lengths(*lengths, np.array([image])) if before else lengths[1]
    counted = processor.template.item_lengths(added, np.array([len(item.patches)]))
    assert counted == len(item.tokens)
    assert item.image_token_mask.sum() == 6 * image
    assert (item.tokens[item.image_token_mask] == checkpoint.config.image_token_id).all()


def test_an_item_has_one_instruction(published):
    with pytest.raises(ItemError, match=r"^item 0: an instruction is given with the item, and ano"):
        Embedder.load(published).encode([{"text": "a", "instruction": "b"}], instruction="c")


@pytest.mark.usefixtures("no_videos")
@pytest.mark.parametrize("kind", ["stablehlo", "sentence-transformers"])
def test_exports_carry_the_prompt_of_a_published_embedder(published, tmp_path, kind):
    embedder = Embedder.load(published, dtype="float32", images=LIMITS)
    items = [case for case in CASES.values() if "instruction" not in case]
    if kind == "stablehlo":
        items = [item for item in items if not isinstance(item.get("image"), list)]
        stablehlo.write(embedder, tmp_path)
        encode = loader.Embedder(tmp_path).encode
    else:
        sentence_transformers.write(embedder, tmp_path)
        model = SentenceTransformer(str(tmp_path), device="cpu")

        def encode(given, instruction):
            return model.encode(given, prompt=instruction)

    for instruction in (None, " Find it! ", "Find it", "Find 「this」"):
        expected = embedder.encode(items, instruction=instruction)
        np.testing.assert_allclose(encode(items, instruction), expected, rtol=0, atol=1e-5)


def test_a_ret_token_for_a_model_without_one_is_refused(published):
    with pytest.raises(
        ConfigError, match=r'^ret_token "x" has no place .*: its pooling is "last"$'
    ):
        Embedder.load(published, ret_token="x")
