"""A tokenizer of a benchmark's own: repeatable, lossless, of Qwen's kind, and fit for prompts."""

import dataclasses
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from puma_jax.config import PromptConfig
from puma_jax.data import mbeir
from puma_jax.data.mbeir import Candidate, Query
from puma_jax.data.prompts import Processor, query_text
from puma_jax.data.vocabulary import SMALLEST, SPECIAL_TOKENS, train_tokenizer
from puma_jax.errors import ConfigError, DataError
from tests.data import fake_mbeir
from tests.reference import SPECIAL

SIZE = 320
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))


@pytest.fixture(scope="module")
def tokenizer(root):
    return train_tokenizer(root, SIZE)


@pytest.fixture(scope="module")
def processor(root, tiny):
    return processor_of(train_tokenizer(root, SIZE), tiny.config)


def processor_of(tokenizer, config, vocab_size=SIZE):
    """A processor of a model whose vocabulary is the tokenizer's, which cuts at 30 tokens."""
    names = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    image, start, end = tokenizer.convert_tokens_to_ids(list(names))
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, vocab_size=vocab_size),
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        prompt=PromptConfig(template="bare", max_text_tokens=30),
    )
    return Processor(tokenizer, config)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_any_number_of_threads_and_any_order_give_the_same_bytes(root, tmp_path):
    train_tokenizer(root, SIZE).save_pretrained(tmp_path / "here")
    expected = (tmp_path / "here/tokenizer.json").read_bytes()
    for name in (fake_mbeir.UNION_QUERIES, fake_mbeir.UNION_POOL):
        lines = (root / name).read_bytes().splitlines(keepends=True)
        turned = tmp_path / "turned" / name
        turned.parent.mkdir(parents=True)
        turned.write_bytes(b"".join(reversed(lines)))
    instructions = tmp_path / "turned/instructions/query_instructions.tsv"
    mbeir.write_instructions(instructions, reversed(fake_mbeir.INSTRUCTIONS))
    program = (
        "import sys; from pathlib import Path;"
        "from puma_jax.data.vocabulary import train_tokenizer;"
        f"train_tokenizer(Path(sys.argv[1]), {SIZE}).save_pretrained(sys.argv[2])"
    )
    out = tmp_path / "there"
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "turned", out],
        env=os.environ | {"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"},
        check=True,
        capture_output=True,
    )
    assert (out / "tokenizer.json").read_bytes() == expected


@given(TEXT)
def test_any_text_comes_back(tokenizer, text):
    composed = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(encode(tokenizer, text)) == composed


@pytest.mark.parametrize("text", ["a , b .", "  two  spaces\n\n", "i'll\tŻółć 四季 🚲", "e\u0301"])
def test_white_space_and_signs_come_back(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == unicodedata.normalize("NFC", text)


@given(TEXT, TEXT)
def test_a_lines_end_is_never_joined_with_what_follows(tokenizer, instruction, text):
    line, text = f"{instruction}.\n", text.replace("\r", "").strip()
    assert encode(tokenizer, line) + encode(tokenizer, text) == encode(tokenizer, line + text)


@given(TEXT)
def test_words_are_split_as_qwen_splits_them(tokenizer, text):
    ours, theirs = tokenizer.backend_tokenizer, Qwen2Tokenizer().backend_tokenizer
    assert ours.normalizer.normalize_str(text) == theirs.normalizer.normalize_str(text)
    assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)


def test_special_tokens_come_last(tokenizer):
    assert set(SPECIAL_TOKENS) == set(SPECIAL)
    learned = len(tokenizer) - len(SPECIAL_TOKENS)
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == [*range(learned, len(tokenizer))]
    assert learned > 256
    assert len(tokenizer) < SIZE
    assert encode(tokenizer, "<|im_start|>") == [ids[1]]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("size", [SMALLEST, SMALLEST + 10])
def test_with_ret_it_has_the_size_that_was_asked_for(root, tiny, size):
    tokenizer = train_tokenizer(root, size)
    processor = processor_of(tokenizer, tiny.config, size)
    assert processor.ret_token_id == size - 1
    assert len(tokenizer) == size


def test_instructions_queries_and_documents_are_learned_as_they_are_read(processor):
    for word in ("Find", " thing", "Entity", ".\n"):
        assert len(encode(processor.tokenizer, word)) == 1
    words = [
        processor.tokenizer.decode([token])
        for token in processor.tokenize_instruction("find a picture")
    ]
    assert words == ["Find", " a", " picture", ".\n"]


@pytest.mark.filterwarnings("ignore::puma_jax.data.prompts.TextTruncationWarning")
@given(TEXT, st.sampled_from(["find a picture", "Which picture is it?", "what (or who)?!"]))
def test_an_instruction_and_a_text_tokenized_apart_are_the_whole(processor, text, instruction):
    together = processor.tokenize_text(query_text(instruction, text), image=True)
    apart = processor.tokenize_text(
        processor.read_after_instruction(text), image=True, instructed=True
    )
    line = processor.tokenize_instruction(instruction)
    assert processor.template.join(line, apart, image=True) == together.tokens
    lengths = (np.array([n]) for n in (len(line), len(apart.tokens), apart.text_length))
    joined = processor.template.joined_lengths(*lengths, np.array([True]))
    assert joined == len(together.tokens)


def test_an_item_of_an_image_and_a_text(processor):
    patches = np.zeros((24, 588), np.uint8)
    item = processor.item("A <|image_pad|>.", [(patches, (4, 6))])
    placeholders = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    assert processor.tokenizer.decode(item.tokens) == f"{placeholders}A <|image_pad|>.\n[RET]"
    assert item.image_token_mask.sum() == 6


def test_only_what_training_reads_is_learned(tmp_path):
    fake_mbeir.write_sets(tmp_path)
    tokenizer = train_tokenizer(tmp_path, SIZE)
    other = "cand_pool/local/mbeir_other_task1_cand_pool.jsonl"
    never = [Candidate(f"8:{n}", "zzzzzzzz", None, "text") for n in range(100)]
    mbeir.write_candidates(tmp_path / other, never)
    assert train_tokenizer(tmp_path, SIZE).get_vocab() == tokenizer.get_vocab()


def test_too_small_a_vocabulary_is_refused(root):
    with pytest.raises(ConfigError, match=r"^vocab_size 264 must be at least 265: 256 bytes, 8 sp"):
        train_tokenizer(root, SMALLEST - 1)


def test_a_benchmark_without_texts_is_refused(tmp_path):
    image = fake_mbeir.image_path(0)
    query = Query("mine:1", None, image, "image", ("9:3",), 4)
    mbeir.write_queries(tmp_path / fake_mbeir.UNION_QUERIES, [query])
    pool = [Candidate("9:3", None, image, "image")]
    mbeir.write_candidates(tmp_path / fake_mbeir.UNION_POOL, pool)
    with pytest.raises(DataError, match=f"^{tmp_path} has no texts to train a tokenizer on, only"):
        train_tokenizer(tmp_path, SIZE)


def test_a_bad_record_is_named(tmp_path):
    fake_mbeir.write_union(tmp_path)
    with open(tmp_path / fake_mbeir.UNION_POOL, "a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"^mbeir_union_train_cand_pool.jsonl:13: did is missing"):
        train_tokenizer(tmp_path, SIZE)
