"""A tokenizer trained on the texts of a benchmark, for models that are trained from scratch.

A vocabulary of 150,000 tokens would be most of a small model, and most of it is never read. This
tokenizer is of the same kind as Qwen's (byte-level BPE, the same split into words, the same special
tokens), so that all code for Qwen models works with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from puma_jax.config import require
from puma_jax.data.builder.sources import (
    Ids,
    Reading,
    find_candidates,
    find_queries,
    pool_files,
    query_files,
)
from puma_jax.data.mbeir import (
    BadRecords,
    OnBadRecord,
    discover,
    instruction_key,
    parse_candidate,
    parse_query,
    read_instructions,
)
from puma_jax.data.prompts import normalize_text, query_text
from puma_jax.errors import DataError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""The special tokens of Qwen2-VL for chat turns and images, in the order of their ids."""

SMALLEST = 256 + len(SPECIAL_TOKENS) + 1
"""The smallest vocabulary: 256 bytes, the special tokens and [RET]."""

# The split into words of Qwen2. A newline ends its word or is a word with other white space, so it
# is never merged with the text after it; `Processor.tokenize_instruction` relies on that.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    root: Path, vocab_size: int, on_bad_record: OnBadRecord = "error"
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the training texts of a benchmark.

    The same files give the same tokenizer, byte for byte, on any number of threads.

    Args:
        root: A folder in M-BEIR layout.
        vocab_size: Rows of the token table of the model: bytes, learned tokens, special tokens and
            [RET], which `Processor` adds. Small benchmarks may give fewer tokens.
        on_bad_record: "error" stops at a bad record, "skip" leaves it out.

    Raises:
        ConfigError: `vocab_size` leaves no room for the bytes.
        DataError: There is nothing to train on, a file cannot be read, or a record is bad.
    """
    require(
        vocab_size >= SMALLEST,
        f"vocab_size {vocab_size} must be at least {SMALLEST}: 256 bytes, {len(SPECIAL_TOKENS)} "
        "special tokens and [RET]",
    )
    lines = _lines(root, on_bad_record)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{root} has no texts to train a tokenizer on, only images")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - 1,
        # A token that occurs once in the whole benchmark would not be trained.
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(itertools.chain([first], lines), trainer)
    # Added after training, so that special tokens in texts are plain text, as in `Processor`.
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _lines(root: Path, on_bad_record: OnBadRecord) -> Iterator[str]:
    """Yield every text of the training data as a line that the model reads.

    A query comes once with each prompt of its instruction: these few sentences are a large part of
    what the model reads and deserve tokens of their own.
    """
    benchmark = discover(root)
    rows = read_instructions(benchmark.instructions) if benchmark.instructions else {}
    reading = Reading(on_bad_record, BadRecords())
    ids: Ids = {}
    queries = find_queries(query_files(benchmark), rows, (), ids, reading)
    candidates, _ = find_candidates(pool_files(benchmark), ids, reading, only_named=False)
    for _, line in queries.lines.read():
        query = parse_query(line.content)
        row = rows.get(instruction_key(query))
        for prompt in row.prompts if row else [None]:
            if text := query_text(prompt, query.text):
                yield f"{text}\n"
    for _, line in candidates.read():
        if text := normalize_text(parse_candidate(line.content).text):
            yield f"{text}\n"
