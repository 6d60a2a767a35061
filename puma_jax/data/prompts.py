"""Items to token ids: the PUMA prompt, which ends at [RET].

Wording, normalisation and the cut are those of arXiv 2507.08064 and its released code. Attention
is causal, so what the chat template puts behind [RET] cannot matter and is left away.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
from transformers import PreTrainedTokenizerBase

from puma_jax.config import ModelConfig
from puma_jax.data.items import Item
from puma_jax.data.positions import counted_positions, mrope_positions, patch_positions
from puma_jax.errors import CheckpointError, ItemError
from puma_jax.typing import UInt8, ndarray

_START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_TURN = "<|im_end|>\n<|im_start|>assistant\n"
_ASK = {
    (True, True): "\nSummarize above image and sentence in one word: ",
    (False, True): "\nSummarize above sentence in one word: ",
    (True, False): "\nSummarize above image in one word: ",
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

    >>> query_text("find a picture", "a red bicycle")
    'Find a picture.\na red bicycle.'
    """
    return normalise(f"{normalise(instruction)}\n{text or ''}")


class Prompter:
    """Turns texts and patches into items for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ModelConfig):
        """Prepare the tokenizer: [RET] takes the first row of the token table that is spare.

        Raises:
            CheckpointError: The tokenizer is not a fast one, or the table has no spare row.
        """
        if not tokenizer.is_fast:
            raise CheckpointError(f"{type(tokenizer).__name__} has no tokenizer.json to run fast")
        self.config = config
        self.tokenizer = tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": [config.prompt.ret_token]})
        self.ret_token_id = tokenizer.get_added_vocab()[config.prompt.ret_token]
        if self.ret_token_id >= config.decoder.vocab_size:
            raise CheckpointError(
                f"no spare row for {config.prompt.ret_token}: the tokenizer has {len(tokenizer)} "
                f"tokens, the token table {config.decoder.vocab_size} rows"
            )
        self._start = tokenizer.encode(_START, add_special_tokens=False)
        self._end = [*tokenizer.encode(_TURN, add_special_tokens=False), self.ret_token_id]
        # Users' texts may hold "<|image_pad|>" or "<|im_end|>": to this copy they are plain text.
        self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        self._warned = False

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
        config, vision = self.config, self.config.vision
        if not text and patches is None:
            raise ItemError("an item has neither text nor image")
        ask = _ASK[patches is not None, bool(text)]
        body = self._plain.encode(self._cut(text) + ask, add_special_tokens=False).ids
        grids = []
        if patches is None:
            patches = np.zeros((0, vision.patch_values), np.uint8)
        else:
            holders = [config.image_token_id] * (len(patches) // vision.merged)
            body = [config.vision_start_token_id, *holders, config.vision_end_token_id, *body]
            grids = [(grid[0] // vision.merge_size, grid[1] // vision.merge_size)]
        tokens = np.array([*self._start, *body, *self._end], np.int32)
        visual = tokens == config.image_token_id
        return Item(
            tokens=tokens,
            positions=mrope_positions(visual, grids)
            if config.prompt.positions == "mrope"
            else counted_positions(len(tokens)),
            visual=visual,
            patches=patches,
            patch_positions=patch_positions(*grid, vision.merge_size),
            patch_images=np.zeros(len(patches), np.int32),
        )

    def _cut(self, text: str) -> str:
        """Return the text, cut at the limit of tokens; say so the first time."""
        limit = self.config.prompt.max_text_tokens
        if len(text.encode()) <= limit:  # no token is shorter than a byte
            return text
        encoded = self._plain.encode(text, add_special_tokens=False)
        if len(encoded.ids) <= limit:
            return text
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a text of {len(encoded.ids)} tokens was cut at {limit} "
                "(PromptConfig.max_text_tokens); later ones are cut without a word",
                TextCutWarning,
                stacklevel=2,
            )
        return text[: encoded.offsets[limit - 1][1]]
