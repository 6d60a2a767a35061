"""Pairs of a query and a document to token ids, in the prompt of Qwen3-VL-Reranker.

The system turn asks whether the document meets the requirements, the user turn holds instruction,
query and document, images before texts, and the model answers "yes" or "no".
"""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from puma_jax.config import ModelConfig
from puma_jax.data.items import Item, Patches, build_item, image_tokens
from puma_jax.data.prompts import TextTruncationWarning
from puma_jax.errors import CheckpointError
from puma_jax.typing import Bool, Int, ndarray

DEFAULT_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
MAX_TOKENS = 8192
"""Tokens of a pair; of a longer one, the last tokens of its texts are left out."""

_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
_START, _END = "<|im_start|>", "<|im_end|>"
_EMPTY = "NULL"


class Side(NamedTuple):
    """A query or a document: its text, its images, or both."""

    text: str | None
    images: tuple[Patches, ...] = ()


class PairProcessor:
    """Turns pairs of a query and a document into items of one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: ModelConfig):
        """Find the tokens of the prompt.

        Raises:
            CheckpointError: The tokenizer has no token "yes", "no", or for a turn of a chat.
        """
        self.config = config
        vocab = tokenizer.get_vocab()
        for token in ("yes", "no", _START, _END):
            if token not in vocab:
                raise CheckpointError(
                    f'the tokenizer has no token "{token}": it is not that of a reranker'
                )
        self.yes, self.no = vocab["yes"], vocab["no"]
        self._start, self._end = (vocab[_START],), (vocab[_END],)
        # Texts may hold special tokens, which are plain text to this copy.
        self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        self._warned = False

    def item(self, query: Side, document: Side, instruction: str | None = None) -> Item:
        """Return the item of a pair; its last token is the one whose state is scored.

        Args:
            query: The query.
            document: The document.
            instruction: What the query asks for; `DEFAULT_INSTRUCTION` if there is none.
        """
        start, end = self._start, self._end
        parts = [
            _Part(start),
            _Part(self._encode(f"system\n{_SYSTEM}"), text=True),
            _Part(end),
            _Part(self._encode("\n"), text=True),
            _Part(start),
            *self._sides(instruction or DEFAULT_INSTRUCTION, query, document),
        ]
        closing = (*end, *self._encode("\n"), *start, *self._encode("assistant\n"))
        tokens = np.array([token for part in parts for token in part.tokens], np.int32)
        is_text = np.repeat([part.text for part in parts], [len(part.tokens) for part in parts])
        is_pad = np.repeat(
            [part.image is not None for part in parts], [len(part.tokens) for part in parts]
        ) & (tokens == self.config.image_token_id)
        kept = self._kept(is_text)
        tokens = np.concatenate([tokens[kept], np.array(closing, np.int32)])
        mask = np.concatenate([is_pad[kept], np.zeros(len(closing), bool)])
        images = [part.image for part in parts if part.image is not None]
        return build_item(tokens, mask, images, self.config)

    def _sides(self, instruction: str, query: Side, document: Side) -> list[_Part]:
        """Return the user's turn; its texts are tokenized together where no image is between."""
        parts, text = [], f"user\n<Instruct>: {instruction}<Query>:"
        for side, after in ((query, "\n<Document>:"), (document, "")):
            if side.images:
                parts.append(_Part(self._encode(text), text=True))
                for image in side.images:
                    parts.append(_Part(tuple(image_tokens(image, self.config)), image=image))
                text = ""
            elif not side.text:
                text += _EMPTY
            text += (side.text or "") + after
        return [*parts, _Part(self._encode(text), text=True)]

    def _kept(self, is_text: Bool[ndarray, "n"]) -> Int[ndarray, "kept"]:
        """Return which tokens stay: at most `MAX_TOKENS`, the last of the texts going first."""
        excess = len(is_text) - MAX_TOKENS
        if excess <= 0:
            return np.arange(len(is_text))
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a pair of {len(is_text):,} tokens was truncated to {MAX_TOKENS:,}; later "
                "truncations are not reported",
                TextTruncationWarning,
                stacklevel=3,
            )
        return np.setdiff1d(np.arange(len(is_text)), np.flatnonzero(is_text)[-excess:])

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)


class _Part(NamedTuple):
    """Neighboring tokens of a pair."""

    tokens: tuple[int, ...]
    text: bool = False
    """Whether they are text, which may be truncated."""
    image: Patches | None = None
    """The image they stand for."""
