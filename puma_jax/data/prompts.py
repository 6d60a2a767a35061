"""Items to token ids: the PUMA prompt, which ends at [RET].

Wording, normalisation and the cut are those of arXiv 2507.08064 and its released code. Attention
is causal, so what the chat template puts behind [RET] cannot matter and is left away. The bare
template, for models that were never tuned to chat, leaves away all that is not the item.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from puma_jax.config import ModelConfig, PromptTemplate
from puma_jax.data.items import Body, Item, Template
from puma_jax.errors import CheckpointError, ItemError
from puma_jax.typing import UInt8, ndarray


class Wording(NamedTuple):
    """What a template puts around an item."""

    start: str
    text_end: str
    """Ends every text, and is cut with it."""
    ask: Mapping[tuple[bool, bool], str]
    """The sentence that asks for one word, by whether there are an image and a text."""
    turn: str
    """Between the item and [RET]."""


WORDINGS: Mapping[PromptTemplate, Wording] = {
    "chat": Wording(
        start="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        text_end="",
        ask={
            (True, True): "\nSummarize above image and sentence in one word: ",
            (False, True): "\nSummarize above sentence in one word: ",
            (True, False): "\nSummarize above image in one word: ",
        },
        turn="<|im_end|>\n<|im_start|>assistant\n",
    ),
    # A text ends its line: an instruction is tokenised with the end of its own, so that one which
    # stands alone, before an image's query, must be read as one that a text follows. This rarely
    # costs a token: tokenizers of the Qwen kind read a full stop and a line's end as one.
    "bare": Wording(
        start="",
        text_end="\n",
        ask={(True, True): "", (False, True): "", (True, False): ""},
        turn="",
    ),
}


class TextCutWarning(UserWarning):
    """A text was longer than `PromptConfig.max_text_tokens` and has been cut."""


def normalise(text: str | None) -> str:
    """Return a text as the prompts want it: trimmed, capitalised, with a full stop at its end.

    >>> normalise(' "a red bicycle" ')
    'A red bicycle.'
    """
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def query_text(instruction: str | None, text: str | None) -> str:
    r"""Return the text of a query: its instruction, then its own text on the next line.

    White space around the text is dropped, so that the two can be tokenised apart.

    >>> query_text("find a picture", "a red bicycle")
    'Find a picture.\na red bicycle.'
    """
    return normalise(f"{normalise(instruction)}\n{(text or '').strip()}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a model's folder.

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


class Prompter:
    """Turns texts and patches into items for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: ModelConfig):
        """Prepare the tokenizer: [RET] takes the first row of the token table that is spare.

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
        wording = self._wording = WORDINGS[config.prompt.template]
        turn = tokenizer.encode(wording.turn, add_special_tokens=False)
        self.template = Template(
            config=config,
            start=tuple(tokenizer.encode(wording.start, add_special_tokens=False)),
            end=(*turn, self.ret_token_id),
            ask_text=self._encode(wording.ask[False, True]),
            ask_both=self._encode(wording.ask[True, True]),
        )

    def item(
        self,
        text: str,
        patches: UInt8[ndarray, "patches values"] | None = None,
        grid: tuple[int, int] = (0, 0),
    ) -> Item:
        """Return the item for a text (may be empty), an image (may be None) or both.

        Args:
            text: As it shall be read; see `normalise` and `query_text`.
            patches: Of an image, from `images.patchify`.
            grid: Rows and columns of these patches.

        Raises:
            ItemError: There is neither text nor image.
        """
        if not text and patches is None:
            raise ItemError("an item has neither text nor image")
        return self.template.assemble(
            self.body(text, image=patches is not None).tokens, patches, grid
        )

    def body(self, text: str, *, image: bool, instructed: bool = False) -> Body:
        """Return the tokens of a text and of the sentence that asks for one word.

        Args:
            text: As it shall be read; may be empty.
            image: Whether an image comes before it.
            instructed: Whether an instruction, and the end of its line, comes before it; then an
                empty text leaves no line of its own.
        """
        ask = self._wording.ask[image, bool(text) or instructed]
        if text:
            text += self._wording.text_end
        elif instructed:
            ask = ask.removeprefix("\n")
        alone, limit = self._encode(text), self.config.prompt.max_text_tokens
        if len(alone) > limit:
            self._warn_once(len(alone))
            return Body((*alone[:limit], *self._encode(ask)), limit)
        return Body(self._encode(text + ask), len(alone))

    def instruction(self, instruction: str) -> tuple[int, ...]:
        """Return the tokens of an instruction and of the end of its line.

        `Template.join` puts them before a `body` that was made with `instructed`: tokenizers of
        the Qwen kind never join a line's end with what follows.
        """
        return self._encode(normalise(instruction) + "\n")

    def save_tokenizer(self, folder: Path, source: Mapping[str, Any]) -> None:
        """Write the tokenizer, with [RET], so that every generation of transformers loads it.

        Args:
            folder: An existing folder.
            source: The tokenizer_config.json that came with the base model. It is kept, with
                [RET] added; the one transformers 5 writes names classes that 4 does not know.
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
                f"a text of {length} tokens was cut at {self.config.prompt.max_text_tokens} "
                "(PromptConfig.max_text_tokens); later ones are cut without a word",
                TextCutWarning,
                stacklevel=3,
            )
