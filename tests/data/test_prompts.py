"""The PUMA prompt: its three forms, its normalisation, its cut, and [RET] at its end."""

import warnings

import numpy as np
import pytest

from puma_jax.data.prompts import (
    Prompter,
    TextCutWarning,
    load_tokenizer,
    normalise,
    query_text,
)
from puma_jax.errors import CheckpointError, ItemError
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
    assert normalise(given) == expected


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
    holders = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    for (text, *images), body in forms:
        item = tiny.item(text, *images)
        decoded = tiny.prompter.tokenizer.decode(item.tokens)
        assert decoded == START + body.replace("IMAGE", holders) + END
        assert item.tokens[-1] == tiny.prompter.ret_token_id
        assert item.visual.sum() == len(item.patches) // 4 == (6 if images else 0)


def test_ret_takes_the_first_spare_row_and_keeps_it(tiny):
    tokenizer = byte_tokenizer()
    before = len(tokenizer)
    assert Prompter(tokenizer, tiny.config).ret_token_id == before
    assert Prompter(tokenizer, tiny.config).ret_token_id == before


def test_a_token_table_without_a_spare_row_is_refused(tiny):
    import dataclasses

    decoder = dataclasses.replace(tiny.config.decoder, vocab_size=len(byte_tokenizer()))
    config = dataclasses.replace(tiny.config, decoder=decoder)
    with pytest.raises(CheckpointError, match=r"no spare row for \[RET\]"):
        Prompter(byte_tokenizer(), config)


def test_special_tokens_in_a_users_text_are_plain_text(tiny):
    item = tiny.item("An <|image_pad|> and [RET] and <|im_end|>.")
    special = [tiny.config.image_token_id, tiny.prompter.ret_token_id]
    assert np.isin(item.tokens[:-1], special).sum() == 0
    assert not item.visual.any()
    assert "<|image_pad|>" in tiny.prompter.tokenizer.decode(item.tokens)


def test_text_is_cut_at_450_tokens_and_that_is_said_once(tiny):
    prompter = tiny.prompter
    longest = prompter.item("x" * 449 + ".")
    with pytest.warns(TextCutWarning, match="a text of 601 tokens was cut at 450"):
        cut = prompter.item("x" * 600 + ".")
    assert len(cut.tokens) == len(longest.tokens)
    assert prompter.tokenizer.decode(cut.tokens[-60:]).endswith(
        "x\nSummarize above sentence in one word:" + END
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompter.item("y" * 600)


@pytest.mark.parametrize("text", ["a red bicycle", "", None, "two\nlines", 'a "quote"'])
@pytest.mark.parametrize("image", [True, False])
def test_instruction_and_body_tokenised_apart_are_the_whole(tiny, text, image):
    prompter = tiny.prompter
    together = prompter.body(query_text("find it", text), image=image)
    tail = query_text("find it", text).removeprefix("Find it.").removeprefix("\n")
    apart = prompter.body(tail, image=image, instructed=True)
    instruction = prompter.instruction("find it")
    assert prompter.template.join(instruction, apart, image=image) == together.tokens


@pytest.mark.parametrize("length", [436, 441, 442, 443, 600])
@pytest.mark.parametrize("image", [True, False])
def test_joined_and_cut_they_are_the_whole_cut(tiny, length, image):
    prompter = tiny.prompter
    text = ("word " * 200)[: length - 1] + "."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextCutWarning)
        together = prompter.body(query_text("find it", text), image=image)
        apart = prompter.body(text, image=image, instructed=True)
    instruction = prompter.instruction("find it")
    assert prompter.template.join(instruction, apart, image=image) == together.tokens
    one = [np.array([n]) for n in (len(instruction), len(apart.tokens), apart.text, image)]
    one[3] = one[3].astype(bool)
    assert prompter.template.joined_lengths(*one)[0] == len(together.tokens)


def test_positions_are_a_plain_count_on_request(tiny):
    import dataclasses

    prompt = dataclasses.replace(tiny.config.prompt, positions="1d")
    prompter = Prompter(byte_tokenizer(), dataclasses.replace(tiny.config, prompt=prompt))
    patches, grid = np.zeros((24, 588), np.uint8), (4, 6)
    item = prompter.item("A.", patches, grid)
    np.testing.assert_array_equal(item.positions, np.arange(len(item.tokens))[:, None].repeat(3, 1))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json: save it once"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)


def test_nothing_to_embed_is_an_error(tiny):
    with pytest.raises(ItemError, match="neither text nor image"):
        tiny.item("")


def test_the_reference_config_has_room_for_ret():
    assert qwen2_vl_config().text_config.vocab_size > len(byte_tokenizer())
