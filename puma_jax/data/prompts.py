"""Items to token ids: texts and images between the strings of a prompt template."""

from __future__ import annotations

import copy
import hashlib
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from puma_jax.artifacts import write_json
from puma_jax.config import ModelConfig
from puma_jax.data.images import most_patches
from puma_jax.data.items import Item, Patches, TokenizedTemplate, TokenizedText, Visuals
from puma_jax.data.ret_token import add_ret_token, check_ids
from puma_jax.data.templates import PROMPT_TEMPLATES
from puma_jax.data.texts import normalize_text
from puma_jax.errors import ItemError, LongTextError

# A longer text is cut before it is tokenized. What is left is more than enough for the tokens that
# are kept, and this many characters more: tokens never depend on what comes after their own word.
_LONGEST_WORD = 2**16
_MOST_REMEMBERED = 256
"""Suffixes and instructions whose tokens are kept."""


class TextTruncationWarning(UserWarning):
    """A text was longer than `PromptConfig.max_text_tokens` and is truncated."""


def query_text(instruction: str | None, text: str | None) -> str:
    r"""Return the text of a query: its instruction, then its own text on the next line.

    White space around the text is dropped, so that the two can be tokenized separately.

    >>> query_text("find a picture", "a red bicycle")
    'Find a picture.\na red bicycle.'
    """
    return normalize_text(f"{normalize_text(instruction)}\n{(text or '').strip()}")


class Processor:
    """Turns texts and patches into items for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: ModelConfig):
        """Add [RET], if the model pools there, to a tokenizer that lacks it.

        A new one takes the next row of the token table.

        Raises:
            CheckpointError: The token table has no spare row, the tokenizer has ids beyond the
                table, or `ret_token` is a word of texts or stands for an image.
        """
        self.config = config
        self.tokenizer = tokenizer
        check_ids(tokenizer, config)
        self.ret_token_id = (
            add_ret_token(tokenizer, config) if config.prompt.pooling == "ret" else None
        )
        # No token is longer. Four characters compose to one at most, in Unicode's form NFC.
        longest = max(map(len, tokenizer.get_vocab()))
        self._most_characters = 4 * config.prompt.max_text_tokens * longest + _LONGEST_WORD
        # Users' texts may hold "<|image_pad|>" or "<|im_end|>": to this copy they are plain text.
        self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        self._remembered: dict[str, tuple[int, ...]] = {}
        self._warned = False
        self._strings = PROMPT_TEMPLATES[config.prompt.template]
        self.template = self._tokenized_template()

    def _tokenized_template(self) -> TokenizedTemplate:
        """Return the prompt around items as tokens."""
        strings = self._strings

        def encode(text: str) -> tuple[int, ...]:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))

        own_turn = bool(strings.after_instruction)
        # What the tokenizer itself adds belongs to a prompt that is the model's own, not to PUMA's.
        before, after = _added_by_tokenizer(self.tokenizer) if own_turn else ((), ())
        end = () if self.ret_token_id is None else (self.ret_token_id,)
        return TokenizedTemplate(
            config=self.config,
            start=(*before, *encode(strings.start)),
            end=(*encode(strings.generation_prompt), *after, *end),
            suffix_text=self._encode(strings.suffix[False, True]),
            suffix_both=self._encode(strings.suffix[True, True]),
            instruction=self._encode(strings.instruction),
            after_instruction=encode(strings.after_instruction) if own_turn else None,
            before_image=encode(strings.text_start),
        )

    def read(self, text: str | None, instruction: str | None = None) -> str:
        """Return a text as the model reads it, with its instruction if that is part of the text."""
        if self._strings.after_instruction:
            return text or ""
        return query_text(instruction, text)

    def read_after_instruction(self, text: str | None) -> str:
        r"""Return a text as the model reads it after an instruction, without the instruction."""
        if self._strings.after_instruction:
            return text or ""
        return query_text("X.", text).removeprefix("X.").removeprefix("\n")

    def item(
        self,
        text: str,
        images: Sequence[Patches] | Visuals = (),
        instruction: str | None = None,
        *,
        truncate: bool = True,
    ) -> Item:
        """Return the item for a text (may be empty), images before it, or both.

        Args:
            text: The text as the model reads it; see `read`.
            images: The images, in order, or a video.
            instruction: Instruction of the item, unless `text` holds it.
            truncate: Whether to truncate a text of too many tokens; see `tokenize_text`.

        Raises:
            ItemError: There is neither text nor image, and the prompt has nothing in their place.
            LongTextError: The text has too many tokens, and is not to be truncated.
        """
        visuals = images if isinstance(images, Visuals) else Visuals(images)
        if not text and not visuals.images and not self._strings.no_text:
            raise ItemError("an item has neither text nor image")
        before: tuple[int, ...] = ()
        if instruction and self._strings.after_instruction:
            before = self.tokenize_instruction(instruction)
        tokens = self.tokenize_text(text, image=bool(visuals.images), truncate=truncate).tokens
        return self.template.assemble(
            (*before, *tokens),
            visuals.images,
            instruction=len(before),
            captions=[self._encode(caption) for caption in visuals.captions],
            time_step=visuals.time_step,
        )

    def tokenize_text(
        self, text: str, *, image: bool, instructed: bool = False, truncate: bool = True
    ) -> TokenizedText:
        """Return the tokens of a text and of the prompt suffix.

        Args:
            text: The text as the model reads it; may be empty.
            image: Whether an image comes before it.
            instructed: Whether an instruction with its newline comes before it; an empty text then
                adds no line of its own.
            truncate: Whether a text of more than `max_text_tokens` is truncated, with a warning for
                the first one, or is an error.

        Raises:
            LongTextError: The text has too many tokens, and is not to be truncated.
        """
        strings = self._strings
        if not image and strings.after_instruction:
            text = strings.text_start + (text or strings.no_text)
        suffix = strings.suffix[image, bool(text) or instructed]
        if text:
            text += strings.text_end
        elif instructed:
            suffix = suffix.removeprefix("\n")
        start, limit = text[: self._most_characters], self.config.prompt.max_text_tokens
        end = self._encode_again(suffix)
        if start == text:
            tokens = self._encode(text + suffix)
            length = len(tokens) - len(end)
            if length <= limit and tokens[length:] == end:
                return TokenizedText(tokens, length)
        # Too long, or the end of the text and the suffix share a token.
        alone = self._encode(start)
        if len(alone) > limit:
            counted = start == text
            if not truncate:
                raise LongTextError(
                    f"a text has {'' if counted else 'more than '}{len(alone):,} tokens, the model "
                    f"reads {limit:,} (PromptConfig.max_text_tokens): shorten it"
                )
            self._warn_once(len(alone), counted=counted)
            return TokenizedText((*alone[:limit], *end), limit)
        return TokenizedText(self._encode(text + suffix), len(alone))

    def largest_item(self, *, images: int) -> tuple[int, int]:
        """Return the most tokens and patches that an item with so many images has.

        An instruction in a turn of its own is not truncated: it counts as `max_text_tokens`.
        """
        template, config = self.template, self.config
        patches = images * most_patches(config.vision, config.images) if images else 0
        limit = config.prompt.max_text_tokens
        suffix = template.suffix_both if images else template.suffix_text
        own_turn = limit if template.after_instruction is not None else 0
        tokens = np.array([limit + len(suffix) + own_turn])
        length = template.item_lengths(tokens, np.array([patches]), images=max(images, 1))
        return int(length[0]), patches

    def tokenize_instruction(self, instruction: str) -> tuple[int, ...]:
        """Return the tokens of an instruction and its newline.

        `TokenizedTemplate.join` puts them before a text from `tokenize_text(instructed=True)`. The
        result equals tokenizing both at once, because Qwen tokenizers never merge a newline with
        the text after it.
        """
        if self._strings.after_instruction:
            return self._encode_again(_punctuated(instruction)[: self._most_characters])
        return self._encode_again((normalize_text(instruction) + "\n")[: self._most_characters])

    def save_tokenizer(self, folder: Path, source: Mapping[str, Any]) -> None:
        """Write the tokenizer, with [RET] if it has it, so that transformers 4 and 5 load it.

        Args:
            folder: An existing folder.
            source: The tokenizer_config.json of the base model, empty if there is none. It is kept,
                with any [RET] added: transformers 5 writes class names that 4 does not know.

        Raises:
            OSError: The folder cannot be written.
        """
        try:
            self.tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise OSError(str(error)) from error
        if not source:
            return
        if self.ret_token_id is None:
            write_json(folder / "tokenizer_config.json", source)
            return
        ret = self.config.prompt.ret_token
        special = source.get("additional_special_tokens") or []
        if ret not in special:
            special = [*special, ret]
        config = {**source, "additional_special_tokens": special}
        if source.get("added_tokens_decoder") is not None:
            entry = {"content": ret, "special": True, "normalized": False}
            entry |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
            decoder = {**source["added_tokens_decoder"], str(self.ret_token_id): entry}
            config["added_tokens_decoder"] = decoder
        write_json(folder / "tokenizer_config.json", config)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def _encode_again(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a prompt suffix or an instruction, which come with many texts."""
        tokens = self._remembered.get(text)
        if tokens is None:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            tokens = self._remembered[text] = self._encode(text)
        return tokens

    def _warn_once(self, length: int, *, counted: bool) -> None:
        if not self._warned:
            self._warned = True
            found = f"{length}" if counted else f"more than {length}"
            warnings.warn(
                f"a text of {found} tokens was truncated to {self.config.prompt.max_text_tokens} "
                "(PromptConfig.max_text_tokens); later truncations are not reported",
                TextTruncationWarning,
                stacklevel=3,
            )


def _punctuated(instruction: str) -> str:
    """Return an instruction as Qwen3-VL-Embedding reads it, with a full stop unless it has one.

    Any sign of punctuation at its end is enough.
    """
    instruction = instruction.strip()
    ends = not instruction or unicodedata.category(instruction[-1]).startswith("P")
    return instruction if ends else instruction + "."


def _added_by_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that a tokenizer itself puts before and after every text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    first = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[:first]), tuple(whole[first + len(plain) :])


def prompt_fingerprint(processor: Processor) -> dict[str, Any]:
    """Return the settings that decide the tokens of a text: tokenizer, truncation, template.

    The tokenizer is identified by the SHA-256 of its JSON, with any [RET] added, so a base model
    and a model trained from it have the same fingerprint.
    """
    backend = processor.tokenizer.backend_tokenizer.to_str()
    return {
        "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
        "max_text_tokens": processor.config.prompt.max_text_tokens,
        "template": processor.config.prompt.template,
    }
