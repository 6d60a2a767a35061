"""The strings of prompts: that of PUMA, which ends at [RET], and that of Qwen3-VL-Embedding.

PUMA's prompt texts, normalization and truncation are those of arXiv 2507.08064 and its released
code. A causal model reads nothing after [RET], so later tokens are left out. The bare template, for
models that were never tuned to chat, leaves out all that is not the item. The template "instruct"
is that of Qwen3-VL-Embedding: it reads a text as it came, and an instruction is the system turn
before the item.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from puma_jax.config import PromptStyle


class PromptTemplate(NamedTuple):
    """The strings that a prompt puts around an item."""

    start: str
    """Comes before the item."""
    text_end: str
    """Comes after every text and is truncated with it."""
    suffix: Mapping[tuple[bool, bool], str]
    """The sentence after the item that asks for one word, by (has image, has text)."""
    generation_prompt: str
    """Comes after the suffix, before [RET] if there is one: the start of the assistant's turn."""
    instruction: str = ""
    """The instruction of an item that comes without one, where it has a turn of its own."""
    after_instruction: str = ""
    """Comes between that turn and the item; empty where an instruction is part of the text."""
    text_start: str = ""
    """Comes before the item, and is tokenized with a text that has no image before it."""
    no_text: str = ""
    """Stands for an empty text without an image; empty where there is no such item."""


_NO_SUFFIX = {(True, True): "", (False, True): "", (True, False): ""}
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
        suffix=_NO_SUFFIX,
        generation_prompt="",
    ),
    "instruct": PromptTemplate(
        start="<|im_start|>system\n",
        text_end="",
        suffix=_NO_SUFFIX,
        generation_prompt="<|im_end|>\n<|im_start|>assistant\n",
        instruction="Represent the user's input.",
        after_instruction="<|im_end|>\n<|im_start|>user",
        text_start="\n",
        no_text="NULL",
    ),
}
