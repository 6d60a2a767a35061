"""The PUMA prompt: its three forms, its normalisation, its cut, and [RET] at its end."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from puma_jax.config import PromptConfig
from puma_jax.data.prompts import (
    Processor,
    TextTruncationWarning,
    normalize_text,
    query_text,
)
from puma_jax.data.templates import PROMPT_TEMPLATES
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.data.vocabulary import _WORDS, SPECIAL_TOKENS
from puma_jax.errors import CheckpointError, ConfigError, ItemError
from puma_jax.model.families import CONFIG_KEY
from puma_jax.model.qwen2_vl import read_config, write_config
from tests.reference import byte_tokenizer, qwen2_vl_config, random_image

START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
END = " <|im_end|>\n<|im_start|>assistant\n[RET]"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a red bicycle", "A red bicycle."),
        (' "quoted" ', "Quoted."),
        ("Is it?", "Is it?"),
        ("no\r\nreturns!", "No\nreturns!"),
        ("été", "Été."),
        ("", ""),
        ('""', ""),
        (None, ""),
    ],
)
def test_normalisation(given, expected):
    assert normalize_text(given) == expected


def test_a_query_is_its_instruction_and_its_text():
    assert query_text("find it", "a red bicycle") == "Find it.\na red bicycle."
    assert query_text("find it", None) == "Find it."
    assert query_text(None, "a red bicycle") == "A red bicycle."
    assert query_text(None, None) == ""


def test_the_three_forms_end_at_ret(tiny):
    image = random_image(56, 84)
    forms = [
        (["A cat."], "A cat.\nSummarize above sentence in one word:"),
        (["A cat.", image], "IMAGEA cat.\nSummarize above image and sentence in one word:"),
        (["", image], "IMAGE\nSummarize above image in one word:"),
    ]
    placeholders = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    for (text, *images), body in forms:
        item = tiny.item(text, *images)
        decoded = tiny.processor.tokenizer.decode(item.tokens)
        assert decoded == START + body.replace("IMAGE", placeholders) + END
        assert item.tokens[-1] == tiny.processor.ret_token_id
        assert item.image_token_mask.sum() == len(item.patches) // 4 == (6 if images else 0)


def test_ret_takes_the_first_spare_row_and_keeps_it(tiny):
    tokenizer = byte_tokenizer()
    before = len(tokenizer)
    assert Processor(tokenizer, tiny.config).ret_token_id == before
    assert Processor(tokenizer, tiny.config).ret_token_id == before


def test_a_token_table_without_a_spare_row_is_refused(tiny):
    decoder = dataclasses.replace(tiny.config.decoder, vocab_size=len(byte_tokenizer()))
    config = dataclasses.replace(tiny.config, decoder=decoder)
    remedy = (
        r'no spare row for \[RET\]: .* such as --ret-token "<\|(video|vision)_pad\|>", or add rows'
    )
    with pytest.raises(CheckpointError, match=remedy):
        Processor(byte_tokenizer(), config)
    # What it advises works.
    config = dataclasses.replace(config, prompt=PromptConfig(ret_token="<|video_pad|>"))
    tokenizer = byte_tokenizer()
    processor = Processor(tokenizer, config)
    assert processor.ret_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert processor.item("A.").tokens[-1] == processor.ret_token_id
    assert len(tokenizer) == config.decoder.vocab_size


@pytest.mark.parametrize(
    ("ret", "message"),
    [("<|image_pad|>", "stands for something else"), ("a", "is a token of ordinary texts")],
)
def test_ret_is_no_token_that_means_something_else(tiny, ret, message):
    config = dataclasses.replace(tiny.config, prompt=PromptConfig(ret_token=ret))
    with pytest.raises(CheckpointError, match=message):
        Processor(byte_tokenizer(), config)


def test_ids_beyond_the_token_table_are_refused(tiny):
    decoder = dataclasses.replace(tiny.config.decoder, vocab_size=len(byte_tokenizer()) - 1)
    config = dataclasses.replace(tiny.config, decoder=decoder)
    with pytest.raises(CheckpointError, match="the token table has 263 rows"):
        Processor(byte_tokenizer(), config)


def test_special_tokens_in_a_users_text_are_plain_text(tiny):
    item = tiny.item("An <|image_pad|> and [RET] and <|im_end|>.")
    special = [tiny.config.image_token_id, tiny.processor.ret_token_id]
    assert np.isin(item.tokens[:-1], special).sum() == 0
    assert not item.image_token_mask.any()
    assert "<|image_pad|>" in tiny.processor.tokenizer.decode(item.tokens)


def test_visual_tokens_are_told_by_who_put_them_there(tiny):
    """A tokenizer need not call "<|image_pad|>" special: a text may then hold its id."""
    tokenizer = byte_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in backend["added_tokens"]:
        token["special"] = False
    backend = Tokenizer.from_str(json.dumps(backend))
    processor = Processor(PreTrainedTokenizerFast(tokenizer_object=backend), tiny.config)
    patches, grid = np.zeros((24, 588), np.uint8), (4, 6)
    item = processor.item("An <|image_pad|>.", [(patches, grid)])
    assert (item.tokens == tiny.config.image_token_id).sum() == 7
    assert item.image_token_mask.sum() == 6
    first = len(processor.template.start) + 1
    np.testing.assert_array_equal(np.flatnonzero(item.image_token_mask), first + np.arange(6))
    assert not processor.item("An <|image_pad|>.").image_token_mask.any()


@pytest.fixture(scope="module")
def trained():
    """A tokenizer with merges, some of them long, and its token table's config."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    lines = [" ".join(["xx" * n, "été" * n, "naïve\u0301", "\n" * n]) for n in range(1, 9)]
    backend.train_from_iterator(lines * 3, trainer)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.filterwarnings("ignore::puma_jax.data.prompts.TextTruncationWarning")
@pytest.mark.parametrize(
    "unit", ["x", "xx été ", "\n", " ", "e\u0301", "a\u0323\u0307b", "été", "\u1f82", "The 12.\n"]
)
def test_what_is_kept_of_a_long_text_is_what_its_whole_gives(tiny, trained, unit):
    decoder = dataclasses.replace(tiny.config.decoder, vocab_size=700)
    prompt = PromptConfig(template="bare", max_text_tokens=64)
    processor = Processor(trained, dataclasses.replace(tiny.config, decoder=decoder, prompt=prompt))
    for length in (processor._most_characters - 1, processor._most_characters + 40_001):
        text = (unit * (length // len(unit) + 1))[:length]
        whole = trained.backend_tokenizer.encode(text, add_special_tokens=False).ids
        kept = processor.tokenize_text(text, image=False)
        assert kept.text_length == 64
        assert list(kept.tokens) == whole[:64]


@pytest.mark.filterwarnings("ignore::puma_jax.data.prompts.TextTruncationWarning")
@settings(max_examples=300)
@given(
    text=st.text(st.sampled_from("ab é\n\u0301.1🎈"), min_size=1, max_size=40), image=st.booleans()
)
def test_a_text_and_its_suffix_are_the_tokens_of_both_together(tiny, trained, text, image):
    decoder = dataclasses.replace(tiny.config.decoder, vocab_size=700)
    prompt = PromptConfig(max_text_tokens=24)
    processor = Processor(trained, dataclasses.replace(tiny.config, decoder=decoder, prompt=prompt))
    read = processor.tokenize_text(text, image=image)

    def encode(part: str) -> list[int]:
        return trained.backend_tokenizer.encode(part, add_special_tokens=False).ids

    suffix = PROMPT_TEMPLATES["chat"].suffix[image, True]
    alone = encode(text)
    cut = len(alone) > 24
    assert list(read.tokens) == (alone[:24] + encode(suffix) if cut else encode(text + suffix))
    assert read.text_length == min(24, len(alone))


def test_text_is_cut_at_450_tokens_and_that_is_said_once(tiny):
    processor = tiny.processor
    longest = processor.item("x" * 449 + ".")
    with pytest.warns(TextTruncationWarning, match="a text of 601 tokens was truncated to 450"):
        cut = processor.item("x" * 600 + ".")
    assert len(cut.tokens) == len(longest.tokens)
    assert processor.tokenizer.decode(cut.tokens[-60:]).endswith(
        "x\nSummarize above sentence in one word:" + END
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.item("y" * 600)


@pytest.mark.parametrize("text", ["a red bicycle", "", None, "two\nlines", 'a "quote"'])
@pytest.mark.parametrize("image", [True, False])
def test_instruction_and_body_tokenized_apart_are_the_whole(tiny, text, image):
    processor = tiny.processor
    together = processor.tokenize_text(query_text("find it", text), image=image)
    tail = query_text("find it", text).removeprefix("Find it.").removeprefix("\n")
    apart = processor.tokenize_text(tail, image=image, instructed=True)
    instruction = processor.tokenize_instruction("find it")
    assert processor.template.join(instruction, apart, image=image) == together.tokens


@pytest.mark.parametrize("length", [436, 441, 442, 443, 600])
@pytest.mark.parametrize("image", [True, False])
def test_joined_and_cut_they_are_the_whole_cut(tiny, length, image):
    processor = tiny.processor
    text = ("word " * 200)[: length - 1] + "."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextTruncationWarning)
        together = processor.tokenize_text(query_text("find it", text), image=image)
        apart = processor.tokenize_text(text, image=image, instructed=True)
    instruction = processor.tokenize_instruction("find it")
    assert processor.template.join(instruction, apart, image=image) == together.tokens
    one = [np.array([n]) for n in (len(instruction), len(apart.tokens), apart.text_length, image)]
    one[3] = one[3].astype(bool)
    assert processor.template.joined_lengths(*one)[0] == len(together.tokens)


@pytest.fixture(scope="module", params=["chat", "bare"])
def processor(tiny, request):
    """Processors of both templates, which cut at 20 tokens."""
    return processor_of(tiny, request.param)


def processor_of(tiny, template):
    prompt = PromptConfig(template=template, max_text_tokens=20)
    return Processor(byte_tokenizer(), dataclasses.replace(tiny.config, prompt=prompt))


@pytest.mark.filterwarnings("ignore::puma_jax.data.prompts.TextTruncationWarning")
@pytest.mark.parametrize("instruction", ["find it", None])
@pytest.mark.parametrize("image", [True, False])
# After "Find it.", a line's end and the full stop, 10 letters fill 20 tokens.
@pytest.mark.parametrize("text", ["a cat", "two\nlines", 'a "quote"', None]
                         + ["x" * n for n in (8, 9, 10, 11, 18, 19, 20, 40)])  # fmt: skip
def test_what_is_embedded_is_what_was_trained(processor, instruction, image, text):
    if text is None and not image:
        return
    patches = np.zeros((24, 588), np.uint8)
    images = [(patches, (4, 6))] if image else []
    embedded = processor.item(query_text(instruction, text), images)
    template, one = processor.template, lambda value: np.array([value])
    if instruction:
        line = processor.tokenize_instruction(instruction)
        body = processor.tokenize_text(
            processor.read_after_instruction(text), image=image, instructed=True
        )
        tokens = template.join(line, body, image=image)
        lengths = (one(n) for n in (len(line), len(body.tokens), body.text_length))
        assert template.joined_lengths(*lengths, one(image)) == len(tokens)
    else:
        tokens = processor.tokenize_text(query_text(None, text), image=image).tokens
    trained = template.assemble(tokens, images)
    np.testing.assert_array_equal(embedded.tokens, trained.tokens)
    np.testing.assert_array_equal(embedded.image_token_mask, trained.image_token_mask)
    length = template.item_lengths(one(len(tokens)), one(24 if image else 0))
    assert length == len(trained.tokens)


def test_a_bare_item_is_its_image_its_lines_and_ret(tiny):
    processor = processor_of(tiny, "bare")
    placeholders = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    patches, grid = np.zeros((24, 588), np.uint8), (4, 6)
    for text, read in (
        ("", ""),
        ("A cat.", "A cat.\n"),
        ("Find it.\na cat.", "Find it.\na cat.\n"),
    ):
        item = processor.item(text, [(patches, grid)])
        assert processor.tokenizer.decode(item.tokens) == f"{placeholders}{read}[RET]"
        if text:
            assert processor.tokenizer.decode(processor.item(text).tokens) == f"{read}[RET]"


def test_a_bare_text_is_cut_with_the_end_of_its_line(tiny):
    processor = processor_of(tiny, "bare")
    with pytest.warns(TextTruncationWarning, match="a text of 21 tokens was truncated to 20"):
        item = processor.item("x" * 19 + ".")
    assert processor.tokenizer.decode(item.tokens) == "x" * 19 + ".[RET]"


def test_the_template_is_kept_with_the_model(tiny):
    config = processor_of(tiny, "bare").config
    written = write_config(config, {})
    assert read_config(written, {}).prompt == config.prompt
    # Folders from before there were templates.
    del written[CONFIG_KEY]["prompt"]["template"]
    assert read_config(written, {}).prompt.template == "chat"
    written[CONFIG_KEY]["prompt"]["template"] = "plain"
    with pytest.raises(ConfigError, match=r'prompt.template "plain" is not one of chat, bare'):
        read_config(written, {})


def test_positions_are_a_plain_count_on_request(tiny):
    prompt = dataclasses.replace(tiny.config.prompt, positions="1d")
    processor = Processor(byte_tokenizer(), dataclasses.replace(tiny.config, prompt=prompt))
    patches, grid = np.zeros((24, 588), np.uint8), (4, 6)
    item = processor.item("A.", [(patches, grid)])
    np.testing.assert_array_equal(item.positions, np.arange(len(item.tokens))[:, None].repeat(3, 1))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json: save it once"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: model is missing"):
        load_tokenizer(tmp_path)


_FIXED = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "vocab", "!"), 2**31, "model.vocab must give every token an id of its own"),
        (("model", "vocab", "!"), 1, "model.vocab must give every token an id of its own"),
        (("model", "vocab"), {"a": 0}, "model.vocab lacks 210 of the 211 bytes that texts"),
        (("model", "type"), "Unigram", 'model.type "Unigram" is not one of BPE'),
        (("added_tokens", 0, "id"), 5000, "the tokenizers library reads it as 256"),
        (("padding",), _FIXED, "padding.strategy"),
        (("truncation",), {"max_length": 1, "stride": 5}, "truncation.stride 5 is not one of 0"),
        (("normalizer",), {"type": "Precompiled"}, '"Precompiled" is not one of NFC'),
        (("pre_tokenizer", "type"), "Whitespace", "pre_tokenizer"),
        (("model", "merges"), [["no such", "token"]], "tokenizer.json or .* cannot be read: "),
    ],
)  # fmt: skip
def test_what_would_end_the_process_or_drop_text_is_refused(tmp_path, path, value, message):
    byte_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_nothing_to_embed_is_an_error(tiny):
    with pytest.raises(ItemError, match="neither text nor image"):
        tiny.item("")


def test_the_reference_config_has_room_for_ret():
    assert qwen2_vl_config().text_config.vocab_size > len(byte_tokenizer())
