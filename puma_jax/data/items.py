"""One item, ready for the model: tokens, positions and patches of one text, image or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puma_jax.config import ModelConfig
from puma_jax.data.positions import counted_positions, mrope_positions, patch_positions
from puma_jax.typing import Bool, Int, UInt8, ndarray


@dataclass(frozen=True)
class Item:
    """What one item brings into packed rows. Its last token is [RET]."""

    tokens: Int[ndarray, "length"]
    positions: Int[ndarray, "length 3"]
    """Time, height and width position of each token."""
    visual: Bool[ndarray, "length"]
    """Which tokens only hold the place of a visual token, in the order of the patches."""
    patches: UInt8[ndarray, "patches values"]
    patch_positions: Int[ndarray, "patches 2"]
    """Row and column of each patch in its image."""
    patch_images: Int[ndarray, "patches"]
    """Which of the item's images each patch belongs to, from 0."""


@dataclass(frozen=True)
class Body:
    """What an item says, without the template around it."""

    tokens: tuple[int, ...]
    """The text and the sentence that asks for one word."""
    text: int
    """How many tokens the text alone has."""


@dataclass(frozen=True)
class Template:
    """The tokens around a body. It needs no tokenizer, so workers can have it for little."""

    config: ModelConfig
    start: tuple[int, ...]
    end: tuple[int, ...]
    """Its last token is [RET]."""
    ask_text: tuple[int, ...]
    """The sentence that asks for one word where there is text."""
    ask_both: tuple[int, ...]
    """The sentence that asks for one word where there are image and text."""

    def join(self, instruction: Sequence[int], body: Body, *, image: bool) -> tuple[int, ...]:
        """Return the tokens of an instruction and the body of a query, the text of both cut."""
        limit = self.config.prompt.max_text_tokens
        if len(instruction) + body.text <= limit:
            return (*instruction, *body.tokens)
        text = (*instruction, *body.tokens[: body.text])[:limit]
        return (*text, *(self.ask_both if image else self.ask_text))

    def joined_lengths(
        self,
        instruction: Int[ndarray, "n"],
        tokens: Int[ndarray, "n"],
        text: Int[ndarray, "n"],
        image: Bool[ndarray, "n"],
    ) -> Int[ndarray, "n"]:
        """Return the lengths of what `join` returns, from the lengths of what it takes."""
        limit = self.config.prompt.max_text_tokens
        ask = np.where(image, len(self.ask_both), len(self.ask_text))
        return np.where(instruction + text <= limit, instruction + tokens, limit + ask)

    def item_lengths(
        self, body: Int[ndarray, "n"], patches: Int[ndarray, "n"]
    ) -> Int[ndarray, "n"]:
        """Return the lengths of items, from those of their bodies and their numbers of patches."""
        around = len(self.start) + len(self.end)
        return around + body + np.where(patches > 0, 2 + patches // self.config.vision.merged, 0)

    def assemble(
        self,
        body: Sequence[int],
        patches: UInt8[ndarray, "patches values"] | None = None,
        grid: tuple[int, int] = (0, 0),
    ) -> Item:
        """Return the item of a body of tokens and, if there are patches, an image before it.

        Args:
            body: Tokens.
            patches: Of an image, from `images.patchify`.
            grid: Rows and columns of these patches.
        """
        config, vision = self.config, self.config.vision
        framed: list[int] = []
        grids = []
        if patches is None:
            patches = np.zeros((0, vision.patch_values), np.uint8)
        else:
            holders = [config.image_token_id] * (len(patches) // vision.merged)
            framed = [config.vision_start_token_id, *holders, config.vision_end_token_id]
            grids = [(grid[0] // vision.merge_size, grid[1] // vision.merge_size)]
        tokens = np.array([*self.start, *framed, *body, *self.end], np.int32)
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
