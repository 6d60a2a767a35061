"""Items to token ids: the PUMA prompt, which ends at [RET].

Prompt texts, normalization and truncation are those of arXiv 2507.08064 and its released code.
Attention is causal, so tokens after [RET] have no effect and are left out. The bare template, for
models that were never tuned to chat, leaves out all that is not the item.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from puma_jax.config import ModelConfig, PromptStyle
from puma_jax.data.items import Item, TokenizedTemplate, TokenizedText
from puma_jax.errors import CheckpointError, ItemError
from puma_jax.typing import UInt8, ndarray


class PromptTemplate(NamedTuple):
    """The strings that a prompt puts around an item."""

    start: str
    """Comes before the item."""
    text_end: str
    """Comes after every text and is truncated with it."""
    suffix: Mapping[tuple[bool, bool], str]
    """The sentence after the item that asks for one word, by (has image, has text)."""
    generation_prompt: str
    """Comes between the suffix and [RET]: the start of the assistant's turn."""


PROMPT_TEMPLATES: Mapping[PromptStyle, PromptTemplate] = {
    "chat": PromptTemplate(
        start="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        text_end="",
        suffix={
            (True, True): "\nSummarize above image and sentence in one word: ",
            (False, True): "\nSummarize above sentence in one word: ",
            (True, False): "\nSummarize above image in one word: ",
        },
        generation_prompt="<|im_end|>\n<|im_start|>assistant\n",
    ),
    # Every text ends with a newline, because an instruction is tokenized with its newline whether
    # or not a text follows it. This rarely costs a token: Qwen tokenizers have one token for a
    # full stop with a newline.
    "bare": PromptTemplate(
        start="",
        text_end="\n",
        suffix={(True, True): "", (False, True): "", (True, False): ""},
        generation_prompt="",
    ),
}


class TextTruncationWarning(UserWarning):
    """A text was longer than `PromptConfig.max_text_tokens` and is truncated."""


def normalize_text(text: str | None) -> str:
    """Return a text trimmed and capitalized, with a full stop at its end.

    >>> normalize_text(' "a red bicycle" ')
    'A red bicycle.'
    """
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def query_text(instruction: str | None, text: str | None) -> str:
    r"""Return the text of a query: its instruction, then its own text on the next line.

    White space around the text is dropped, so that the two can be tokenized separately.

    >>> query_text("find a picture", "a red bicycle")
    'Find a picture.\na red bicycle.'
    """
    return normalize_text(f"{normalize_text(instruction)}\n{(text or '').strip()}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a model folder.

    Raises:
        CheckpointError: There is no tokenizer.json, or it cannot be read.
    """
    # Not AutoTokenizer, which imports torch wherever it is installed.
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: save it once with transformers' AutoTokenizer"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{folder}/tokenizer.json cannot be read: {error}") from error


class Processor:
    """Turns texts and patches into items for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: ModelConfig):
        """Add [RET] to the tokenizer; it takes the first spare row of the token table.

        Raises:
            CheckpointError: The token table has no spare row.
        """
        self.config = config
        self.tokenizer = tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": [config.prompt.ret_token]})
        self.ret_token_id = tokenizer.get_added_vocab()[config.prompt.ret_token]
        if self.ret_token_id >= config.decoder.vocab_size:
            raise CheckpointError(
                f"no spare row for {config.prompt.ret_token}: the tokenizer has {len(tokenizer)} "
                f"tokens, the token table {config.decoder.vocab_size} rows"
            )
        # Users' texts may hold "<|image_pad|>" or "<|im_end|>": to this copy they are plain text.
        self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        self._warned = False
        strings = self._strings = PROMPT_TEMPLATES[config.prompt.template]
        turn = tokenizer.encode(strings.generation_prompt, add_special_tokens=False)
        self.template = TokenizedTemplate(
            config=config,
            start=tuple(tokenizer.encode(strings.start, add_special_tokens=False)),
            end=(*turn, self.ret_token_id),
            suffix_text=self._encode(strings.suffix[False, True]),
            suffix_both=self._encode(strings.suffix[True, True]),
        )

    def item(
        self,
        text: str,
        patches: UInt8[ndarray, "patches values"] | None = None,
        grid: tuple[int, int] = (0, 0),
    ) -> Item:
        """Return the item for a text (may be empty), an image (may be None) or both.

        Args:
            text: The text as the model reads it; see `normalize_text` and `query_text`.
            patches: The patches of an image, from `images.patchify`.
            grid: Rows and columns of the patches.

        Raises:
            ItemError: There is neither text nor image.
        """
        if not text and patches is None:
            raise ItemError("an item has neither text nor image")
        return self.template.assemble(
            self.tokenize_text(text, image=patches is not None).tokens, patches, grid
        )

    def tokenize_text(self, text: str, *, image: bool, instructed: bool = False) -> TokenizedText:
        """Return the tokens of a text and of the prompt suffix.

        Args:
            text: The text as the model reads it; may be empty.
            image: Whether an image comes before it.
            instructed: Whether an instruction with its newline comes before it; an empty text then
                adds no line of its own.
        """
        suffix = self._strings.suffix[image, bool(text) or instructed]
        if text:
            text += self._strings.text_end
        elif instructed:
            suffix = suffix.removeprefix("\n")
        alone, limit = self._encode(text), self.config.prompt.max_text_tokens
        if len(alone) > limit:
            self._warn_once(len(alone))
            return TokenizedText((*alone[:limit], *self._encode(suffix)), limit)
        return TokenizedText(self._encode(text + suffix), len(alone))

    def tokenize_instruction(self, instruction: str) -> tuple[int, ...]:
        """Return the tokens of an instruction and its newline.

        `TokenizedTemplate.join` puts them before a text from `tokenize_text(instructed=True)`. The
        result equals tokenizing both at once, because Qwen tokenizers never merge a newline with
        the text after it.
        """
        return self._encode(normalize_text(instruction) + "\n")

    def save_tokenizer(self, folder: Path, source: Mapping[str, Any]) -> None:
        """Write the tokenizer, with [RET], so that transformers 4 and 5 load it.

        Args:
            folder: An existing folder.
            source: The tokenizer_config.json of the base model, empty if there is none. It is kept
                with [RET] added, because transformers 5 writes class names that 4 does not know.
        """
        self.tokenizer.save_pretrained(folder)
        if not source:
            return
        ret = self.config.prompt.ret_token
        special = [*source.get("additional_special_tokens", ()), ret]
        config = {**source, "additional_special_tokens": list(dict.fromkeys(special))}
        if "added_tokens_decoder" in source:
            entry = {"content": ret, "special": True, "normalized": False}
            entry |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
            decoder = {**source["added_tokens_decoder"], str(self.ret_token_id): entry}
            config["added_tokens_decoder"] = decoder
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def _warn_once(self, length: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a text of {length} tokens was truncated to {self.config.prompt.max_text_tokens} "
                "(PromptConfig.max_text_tokens); later truncations are not reported",
                TextTruncationWarning,
                stacklevel=3,
            )


def prompt_fingerprint(processor: Processor) -> dict[str, Any]:
    """Return the settings that decide the tokens of a text: tokenizer, truncation, template.

    The tokenizer is identified by the SHA-256 of its JSON with [RET] added, so a base model and
    a model trained from it have the same fingerprint.
    """
    backend = processor.tokenizer.backend_tokenizer.to_str()
    return {
        "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
        "max_text_tokens": processor.config.prompt.max_text_tokens,
        "template": processor.config.prompt.template,
    }
