"""A tokenizer made from a benchmark's own texts, for models that are trained from nothing.

A vocabulary of 150,000 tokens is most of a small model, and most of it is never read. This one is
of the same kind as Qwen's (byte-level BPE, the same split into words, the same special tokens), so
that all that is built on those works with it.
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
    discover,
    instruction_key,
    parse_candidate,
    parse_query,
    read_instructions,
)
from puma_jax.data.prompts import normalise, query_text
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
"""Those of Qwen2-VL that stand around chat turns and images, in the order of their ids."""

SMALLEST = 256 + len(SPECIAL_TOKENS) + 1
"""Tokens of a vocabulary that knows no more than bytes: with the special ones and [RET]."""

# Of Qwen2. A line's end is the last of its word or a word with other white space, so it is never
# joined with a text behind it: `Prompter.instruction` relies on that.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(root: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on what a benchmark's training reads.

    The same files give the same tokenizer, byte for byte, on any number of threads.

    Args:
        root: A folder in M-BEIR layout.
        vocab_size: Rows of the model's token table, all included: bytes, learned tokens, special
            tokens and [RET], which `Prompter` adds. Few texts may give fewer tokens.

    Raises:
        ConfigError: `vocab_size` leaves no room for the bytes.
        DataError: There is nothing to train on, a file cannot be read, or a record is bad.
    """
    require(
        vocab_size >= SMALLEST,
        f"vocab_size {vocab_size} must be at least {SMALLEST}: 256 bytes, {len(SPECIAL_TOKENS)} "
        "special tokens and [RET]",
    )
    lines = _lines(root)
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
        # What is read once in a whole benchmark teaches its row of the token table nothing.
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(itertools.chain([first], lines), trainer)
    # Only now: to the trainer, a special token within a text is plain text, as it is to `Prompter`.
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _lines(root: Path) -> Iterator[str]:
    """Yield every text that the builder makes training data of, as a line that a model reads.

    A query comes once behind each prompt of its instruction: these few sentences are most of what
    is read, and worth tokens of their own.
    """
    benchmark = discover(root)
    rows = read_instructions(benchmark.instructions) if benchmark.instructions else {}
    reading = Reading("error", BadRecords())
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
        if text := normalise(parse_candidate(line.content).text):
            yield f"{text}\n"
