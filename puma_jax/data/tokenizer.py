"""The tokenizer of a model folder, checked before the tokenizers library reads it.

Only byte-level BPE tokenizers are read, as all Qwen models, Llama 3 and SmolLM2 have: the prompt
relies on them (an instruction and a text can be tokenized apart, every token covers at least one
byte, nothing of a text is dropped).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from puma_jax.errors import CheckpointError
from puma_jax.files import read_object
from puma_jax.schema import CountOrZero, Range, shown

_MOST_IDS = 2**24
# The library reserves memory for as many tokens as padding asks for, and aborts if there is none.
_Padding = Annotated[int, Range(0, 2**20)]


@dataclass(frozen=True)
class _Normalizer:
    type: Literal["NFC"]


@dataclass(frozen=True)
class _Split:
    type: Literal["Split"]
    pattern: dict[str, str]
    # "Removed" would drop what the pattern matches.
    behavior: Literal["Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


@dataclass(frozen=True)
class _Digits:
    type: Literal["Digits"]


@dataclass(frozen=True)
class _ByteLevel:
    type: Literal["ByteLevel"]


@dataclass(frozen=True)
class _Sequence:
    type: Literal["Sequence"]
    pretokenizers: list[_Split | _Digits | _ByteLevel]


@dataclass(frozen=True)
class _Model:
    vocab: dict
    merges: list
    type: Literal["BPE"] = "BPE"
    dropout: Annotated[float, Range(0, 0)] | None = None
    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None


@dataclass(frozen=True)
class _AddedToken:
    id: Annotated[int, Range(0, _MOST_IDS)]
    content: str


@dataclass(frozen=True)
class _Fixed:
    Fixed: _Padding


@dataclass(frozen=True)
class _PaddingFields:
    strategy: Literal["BatchLongest"] | _Fixed
    pad_to_multiple_of: Annotated[int, Range(1, 2**20)] | None = None


@dataclass(frozen=True)
class _Truncation:
    max_length: CountOrZero
    stride: Literal[0] = 0


@dataclass(frozen=True)
class _TokenizerJson:
    """The fields of tokenizer.json that decide how texts become tokens."""

    model: _Model
    pre_tokenizer: _ByteLevel | _Sequence
    normalizer: _Normalizer | None = None
    added_tokens: list[_AddedToken] | None = None
    truncation: _Truncation | None = None
    padding: _PaddingFields | None = None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a model folder.

    Raises:
        CheckpointError: There is no tokenizer.json, it is not of a byte-level BPE tokenizer, or it
            cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: save it once with transformers' AutoTokenizer"
        )
    fields = read_object(path, _TokenizerJson, error=CheckpointError, unknown="ignore")
    _check_vocabulary(path, fields.model.vocab)
    try:
        # Not AutoTokenizer, which imports torch wherever it is installed.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.backend_tokenizer.encode("A word.\n", add_special_tokens=False)
    except BaseException as error:
        # The library raises bare Exception, and PanicException, which is not even one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} or tokenizer_config.json cannot be read: {reason[0] if reason else error!r}"
        ) from None
    for token in fields.added_tokens or []:
        found = tokenizer.backend_tokenizer.token_to_id(token.content)
        if found != token.id:
            raise CheckpointError(
                f"{path}: added token {shown(token.content)} has id {token.id}, but the "
                f"tokenizers library reads it as {shown(found)}: ids must follow the vocabulary"
            )
    return tokenizer


def _check_vocabulary(path: Path, vocab: dict[str, Any]) -> None:
    # Not field by field, which takes seconds for Qwen's 150,000 tokens.
    ids = set(vocab.values()) if all(type(value) is int for value in vocab.values()) else set()
    if len(ids) < len(vocab) or (ids and not 0 <= min(ids) <= max(ids) < _MOST_IDS):
        raise CheckpointError(
            f"{path}: model.vocab must give every token an id of its own, from 0 to {_MOST_IDS - 1}"
        )
    needed = _bytes_of_texts()
    lacking = [byte for byte in needed if byte not in vocab]
    if lacking:
        raise CheckpointError(
            f"{path}: model.vocab lacks {len(lacking)} of the {len(needed)} bytes that texts are "
            "made of, which would be dropped from them"
        )


def _bytes_of_texts() -> set[str]:
    """Return the bytes of texts, each as the character that stands for it in a vocabulary.

    Left out are control characters, and bytes that UTF-8 has for no assigned character: SmolLM2's
    vocabulary, made of the bytes of a corpus, lacks some of them.
    """
    two_bytes, three_bytes = range(0x80, 0x800), (0x800, *range(0x1000, 0x10000, 0x1000))
    four_bytes = (0x10000, 0xE0000, 0x100000)  # in planes with characters, one for each first byte
    codes = (*b"\t\n\r", *range(0x20, 0x7F), *two_bytes, *three_bytes, *four_bytes)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {byte for part, _ in split.pre_tokenize_str("".join(map(chr, codes))) for byte in part}
