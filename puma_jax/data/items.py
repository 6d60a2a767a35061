"""One item, ready for the model: tokens, positions and patches of a text, images or both."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from puma_jax.config import ModelConfig
from puma_jax.data.positions import mrope_positions, patch_positions, sequential_positions
from puma_jax.typing import Bool, Int, UInt8, ndarray

Patches = tuple[UInt8[ndarray, "_ values"], tuple[int, int]]
"""Patches of an image, and how many rows and columns of them there are: `images.patchify`.

Those of a video follow each other in time, and have the values of several frames.
"""


class Visuals(NamedTuple):
    """The images of an item, or its video, as they follow each other in a prompt."""

    images: Sequence[Patches]
    """One for each pair of vision marks: an image, a whole video, or the frames of one patch."""
    captions: Sequence[str] = ()
    """The text before each of them; empty for none."""
    time_step: float = 1.0
    """Time positions from one patch of a video to the next."""


@dataclass(frozen=True)
class Item:
    """The arrays that one item adds to packed rows."""

    tokens: Int[ndarray, "length"]
    positions: Int[ndarray, "length 3"]
    """Time, height and width position of each token."""
    image_token_mask: Bool[ndarray, "length"]
    """Which tokens are placeholders of visual tokens, in the order of the patches."""
    patches: UInt8[ndarray, "patches values"]
    patch_positions: Int[ndarray, "patches 2"]
    """Row and column of each patch in its image."""
    patch_images: Int[ndarray, "patches"]
    """Index, from 0, of the image of the item that each patch belongs to."""


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of an item's text and prompt suffix, without the template around them."""

    tokens: tuple[int, ...]
    """The text, then the prompt suffix."""
    text_length: int
    """Tokens of the text alone."""


@dataclass(frozen=True)
class TokenizedTemplate:
    """The prompt template as tokens. It needs no tokenizer, so it is cheap to send to workers."""

    config: ModelConfig
    start: tuple[int, ...]
    end: tuple[int, ...]
    """The tokens after the prompt suffix; the last one is pooled, unless the mean is."""
    suffix_text: tuple[int, ...]
    """The prompt suffix of an item with text only."""
    suffix_both: tuple[int, ...]
    """The prompt suffix of an item with image and text."""
    instruction: tuple[int, ...] = ()
    """The instruction of items that come without one, where it has a turn of its own."""
    after_instruction: tuple[int, ...] | None = None
    """The tokens between that turn and the item; None where an instruction is part of the text."""
    before_image: tuple[int, ...] = ()
    """The tokens before an image that come with the text in items without one."""

    def join(
        self, instruction: Sequence[int], text: TokenizedText, *, image: bool
    ) -> tuple[int, ...]:
        """Return the tokens of an instruction followed by the text of a query.

        Instruction and text together are truncated to `max_text_tokens`; the prompt suffix is kept.
        An instruction in a turn of its own is not truncated.
        """
        if self.after_instruction is not None:
            return (*instruction, *text.tokens)
        limit = self.config.prompt.max_text_tokens
        if len(instruction) + text.text_length <= limit:
            return (*instruction, *text.tokens)
        truncated = (*instruction, *text.tokens[: text.text_length])[:limit]
        return (*truncated, *(self.suffix_both if image else self.suffix_text))

    def joined_lengths(
        self,
        instruction: Int[ndarray, "n"],
        tokens: Int[ndarray, "n"],
        text_length: Int[ndarray, "n"],
        image: Bool[ndarray, "n"],
    ) -> Int[ndarray, "n"]:
        """Return how many tokens the results of `join` add to an item, given their lengths.

        An instruction in a turn of its own takes the place of the default one.
        """
        if self.after_instruction is not None:
            return instruction + tokens - len(self.instruction)
        limit = self.config.prompt.max_text_tokens
        suffix = np.where(image, len(self.suffix_both), len(self.suffix_text))
        return np.where(instruction + text_length <= limit, instruction + tokens, limit + suffix)

    def item_lengths(
        self, tokens: Int[ndarray, "n"], patches: Int[ndarray, "n"], *, images: int = 1
    ) -> Int[ndarray, "n"]:
        """Return the lengths of items.

        Args:
            tokens: Tokens inside the template.
            patches: Patches of the images; 0 for an item without one.
            images: Images of the items that have patches.
        """
        around = len(self.start) + len(self.instruction) + len(self.after_instruction or ())
        marks = len(self.before_image) + 2 * images
        image = np.where(patches > 0, marks + patches // self.config.patches_per_token, 0)
        return around + len(self.end) + tokens + image

    def assemble(
        self,
        tokens: Sequence[int],
        images: Sequence[Patches] = (),
        *,
        instruction: int = 0,
        captions: Sequence[Sequence[int]] = (),
        time_step: float = 1.0,
    ) -> Item:
        """Return the item of these tokens and of the images before them.

        Args:
            tokens: Text and prompt suffix, with an instruction if there is one.
            images: The images, in order.
            instruction: How many of the tokens are an instruction; 0 if there is none.
            captions: Tokens before each image; empty for none.
            time_step: As in `positions.mrope_positions`.
        """
        head = [*self.start]
        if self.after_instruction is not None:
            head += [*(tokens[:instruction] or self.instruction), *self.after_instruction]
            tokens = tokens[instruction:]
        framed = [*self.before_image] if images else []
        # Told by place: a text may hold the id, where the tokenizer does not call it special.
        visual = [False] * (len(head) + len(framed))
        for image, caption in zip(images, captions or [()] * len(images), strict=True):
            own = image_tokens(image, self.config)
            framed += [*caption, *own]
            visual += [False] * len(caption) + [False, *[True] * (len(own) - 2), False]
        ids = np.array([*head, *framed, *tokens, *self.end], np.int32)
        mask = np.zeros(len(ids), bool)
        mask[: len(visual)] = visual
        return build_item(ids, mask, images, self.config, time_step)


def image_tokens(image: Patches, config: ModelConfig) -> list[int]:
    """Return the tokens of an image: a placeholder for each visual token, between two marks."""
    placeholders = [config.image_token_id] * (len(image[0]) // config.patches_per_token)
    return [config.vision_start_token_id, *placeholders, config.vision_end_token_id]


def build_item(
    tokens: Int[ndarray, "length"],
    image_token_mask: Bool[ndarray, "length"],
    images: Sequence[Patches],
    config: ModelConfig,
    time_step: float = 1.0,
) -> Item:
    """Return the item of tokens that are in place.

    Args:
        tokens: All tokens of the item.
        image_token_mask: Which of them are placeholders of visual tokens.
        images: The images they stand for, in order.
        config: The model.
        time_step: As in `positions.mrope_positions`.
    """
    vision, pooling = config.vision, config.images
    merge, stride = vision.merge_size, pooling.spatial_pool_stride
    patches = [cut for cut, _ in images]
    grids = [(len(cut) // (rows * columns), rows, columns) for cut, (rows, columns) in images]
    positions = [
        np.tile(patch_positions(rows, columns, merge, stride), (times, 1))
        for times, rows, columns in grids
    ]
    if pooling.spatial_pool_mode == "random":
        orders = [drawn_first(cut, vision.merged, stride**2) for cut in patches]
        patches = [cut[order] for cut, order in zip(patches, orders, strict=True)]
        positions = [at[order] for at, order in zip(positions, orders, strict=True)]
    # Each time of a video is an image of its own to the tower.
    sizes = [rows * columns for times, rows, columns in grids for _ in range(times)]
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    side = merge * stride
    pooled = [(times, rows // side, columns // side) for times, rows, columns in grids]
    return Item(
        tokens=tokens,
        positions=mrope_positions(image_token_mask, pooled, time_step)
        if config.prompt.positions == "mrope"
        else sequential_positions(len(tokens)),
        image_token_mask=image_token_mask,
        patches=_joined(patches, vision.patch_values),
        patch_positions=np.concatenate([np.zeros((0, 2), np.int32), *positions]),
        patch_images=numbers.astype(np.int32),
    )


def _joined(patches: list[UInt8[ndarray, "_ values"]], values: int) -> UInt8[ndarray, "_ values"]:
    if len(patches) == 1:
        return patches[0]
    return np.concatenate(patches or [np.zeros((0, values), np.uint8)])


def drawn_first(
    patches: UInt8[ndarray, "patches values"], merged: int, pooled: int
) -> Int[ndarray, "patches"]:
    """Return the order of patches in which a visual token drawn at random begins each pooled block.

    The content of the image decides, by SHAKE-128: the draw is the same wherever it is embedded.
    Towers read where a patch is from its position, so that the order changes no visual token.

    Args:
        patches: The patches of an image or a video, in the order of `positions.patch_positions`.
        merged: Patches in a visual token of the tower.
        pooled: Visual tokens in a pooled block, a power of two up to 256.
    """
    blocks = len(patches) // (merged * pooled)
    digest = hashlib.shake_128(np.ascontiguousarray(patches).data).digest(blocks)
    # The others follow in turn; 256 is a multiple of their number, so that all are equally likely.
    turns = (np.frombuffer(digest, np.uint8)[:, None] + np.arange(pooled)) % pooled
    tokens = np.arange(blocks)[:, None] * pooled + turns
    return (tokens.reshape(-1, 1) * merged + np.arange(merged)).reshape(-1)
