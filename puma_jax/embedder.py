"""Embedder: a model folder in, vectors out. The face most people will ever see."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from puma_jax.config import ComputeConfig, DType, ImageConfig, ModelConfig, PromptConfig
from puma_jax.data.images import ImageSource, open_image, patchify
from puma_jax.data.items import Item
from puma_jax.data.packing import Placement, fill, place
from puma_jax.data.prompts import Prompter, load_tokenizer, query_text
from puma_jax.data.shapes import fitting_shape
from puma_jax.errors import CheckpointError, ImageError, ItemError, PackingError
from puma_jax.model import encoder, hf
from puma_jax.model.encoder import Encoder
from puma_jax.rows import Rows, RowShape
from puma_jax.typing import Array, Float, ndarray

RawItem = Mapping[str, Any]
"""{"text": str}, {"image": path, bytes, PIL image or uint8 array}, or both."""

# Items are placed this many chunks at a time: the more, the tighter.
_CHUNKS_IN_WINDOW = 8
_PREPARED_AT_ONCE = 64
_SECONDS_UNTIL_BAR = 2.0


@functools.cache
def _vectors() -> Callable[[Encoder, Rows, ComputeConfig], Array]:
    """Return the compiled function from rows to the unit vectors of all slots."""
    # XLA for CPUs multiplies bfloat16 in float32. Left to itself it widens the weights of all
    # layers before the loop over them: twice their memory more, for every chunk anew.
    by_layer = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return jax.jit(
        lambda params, rows, compute: encoder.unit(encoder.encode(params, rows, compute)),
        static_argnames="compute",
        compiler_options=by_layer if jax.default_backend() == "cpu" else None,
    )


class Embedder:
    """Turns texts, images, and images with text into vectors of one space."""

    def __init__(
        self,
        config: ModelConfig,
        params: Encoder | _Unread,
        tokenizer: PreTrainedTokenizerFast,
        *,
        compute: ComputeConfig | None = None,
        source: hf.HubConfigs | None = None,
    ):
        """Wrap a model; most callers want `Embedder.load`.

        Args:
            config: Of the model.
            params: The model.
            tokenizer: A fast tokenizer; [RET] is added to it.
            compute: How to run; bfloat16 if not given.
            source: The configs the model came with, whose other fields `save` keeps.
        """
        self.config = config
        self.compute = compute or ComputeConfig()
        self._params = params
        self._prompter = Prompter(tokenizer, config)
        self._source = source or hf.HubConfigs()

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: DType | None = "bfloat16",
        compute: ComputeConfig | None = None,
        images: ImageConfig | None = None,
        prompt: PromptConfig | None = None,
        placement: hf.Placement | None = None,
    ) -> Embedder:
        """Open a model; its weights are read when they are first needed.

        So `Embedder.load(...).keep_layers(12)` never reads the layers that are cut.

        Args:
            source: A Hugging Face folder or hub id.
            dtype: Of weights and activations; None keeps the dtype of the files.
            compute: How to run; the default takes its dtype from `dtype`.
            images: Limits on image sizes; None takes those saved with the model, or PUMA's.
            prompt: How items are worded; None takes what was saved with the model, or PUMA's.
            placement: Where leaves shall live, see `hf.Checkpoint.read`.

        Raises:
            CheckpointError: The folder is not a whole model; see `hf.open_checkpoint`.
            UnknownModelError: No family answers to its model_type.
        """
        checkpoint = hf.open_checkpoint(source)
        config = dataclasses.replace(
            checkpoint.config,
            images=images or checkpoint.config.images,
            prompt=prompt or checkpoint.config.prompt,
        )
        dtype = dtype or checkpoint.dtype
        layers = tuple(range(config.decoder.layers))
        return cls(
            config,
            _Unread(checkpoint, layers, dtype, placement),
            load_tokenizer(checkpoint.folder),
            compute=compute or ComputeConfig(dtype=dtype),
            source=checkpoint.source,
        )

    @property
    def params(self) -> Encoder:
        """The weights, read now if they have not been."""
        if isinstance(self._params, _Unread):
            self._params = self._params.read()
        return self._params

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, with [RET]."""
        return self._prompter.tokenizer

    @property
    def width(self) -> int:
        """Values in a vector."""
        return self.config.decoder.width

    def keep_layers(self, keep: int | Sequence[int]) -> Embedder:
        """Return an embedder with only some of the decoder layers; see `encoder.keep_layers`.

        Raises:
            LayerSelectionError: `keep` is empty, repeats a layer or names one the model lacks.
        """
        params: Encoder | _Unread
        if isinstance(self._params, _Unread):
            chosen = encoder.layer_indices(keep, self.config.decoder.layers)
            config = self.config.with_layers(tuple(self.config.kept_layers[i] for i in chosen))
            layers = tuple(self._params.layers[i] for i in chosen)
            params = dataclasses.replace(self._params, layers=layers)
        else:
            config, params = encoder.keep_layers(self.config, self._params, keep)
        return Embedder(
            config,
            params,
            self.tokenizer,
            compute=self.compute,
            source=self._source,
        )

    def encode(
        self,
        items: Iterable[RawItem],
        *,
        instruction: str | None = None,
        tokens_per_chunk: int | None = None,
        progress: bool = True,
    ) -> Float[ndarray, "n width"]:
        """Return one unit vector for each item, in their order.

        An item's vector does not depend on its neighbours (but for rounding).

        Args:
            items: Any number of items; an iterable is read as it is needed.
            instruction: What is looked for, put before the text of every item; for queries.
            tokens_per_chunk: About how many tokens one forward pass reads. The default is small
                on a CPU and large on an accelerator.
            progress: Whether to show a bar when the work takes more than a few seconds.

        Raises:
            ItemError: An item has neither text nor image, or a field of the wrong kind.
            ImageError: An image cannot be read.
        """
        tokens = tokens_per_chunk or (2048 if jax.default_backend() == "cpu" else 16384)
        bar = tqdm(
            total=len(items) if isinstance(items, Sequence) else None,
            unit="item",
            delay=_SECONDS_UNTIL_BAR,
            disable=not progress,
        )
        vectors = [np.zeros((0, self.width), np.float32)]
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            shape: RowShape | None = None
            running: _Running | None = None
            for window in self._windows(items, instruction, tokens * _CHUNKS_IN_WINDOW, pool):
                # The device works on this window while the host prepares the next one.
                shape, started = self._start(window, shape, tokens)
                if running is not None:
                    vectors.append(running.finish(bar))
                running = started
            if running is not None:
                vectors.append(running.finish(bar))
        return np.concatenate(vectors)

    def save(self, folder: str | os.PathLike[str], *, max_shard_bytes: int = 4 * 2**30) -> None:
        """Write a Hugging Face folder that transformers and this class load.

        The folder appears whole or not at all.

        Args:
            folder: Must not exist, or be empty.
            max_shard_bytes: Weights are split into files of at most this size.

        Raises:
            CheckpointError: The folder exists and is not empty, or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists: choose another folder, or remove it")
        unfinished = folder.with_name(f"{folder.name}.partial")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            hf.write_checkpoint(
                unfinished, self.config, self.params, self._source, max_shard_bytes=max_shard_bytes
            )
            self._prompter.save_tokenizer(unfinished, self._source.tokenizer)
            unfinished.replace(folder)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{folder} cannot be written: {reason}") from error

    def _windows(
        self,
        items: Iterable[RawItem],
        instruction: str | None,
        tokens: int,
        pool: ThreadPoolExecutor,
    ) -> Iterator[list[Item]]:
        """Yield prepared items, about so many tokens at a time."""
        numbered = enumerate(items)
        prepare = partial(self._prepare, instruction=instruction)
        window: list[Item] = []
        while batch := list(itertools.islice(numbered, _PREPARED_AT_ONCE)):
            for item in pool.map(prepare, batch):
                window.append(item)
            if sum(len(item.tokens) for item in window) >= tokens:
                yield window
                window = []
        if window:
            yield window

    def _prepare(self, numbered: tuple[int, RawItem], instruction: str | None) -> Item:
        """Tokenise an item and cut its image into patches; an error names the item."""
        number, item = numbered
        try:
            text, image = _checked(item)
            full = query_text(instruction, text)
            if image is None:
                return self._prompter.item(full)
            patches, grid = patchify(open_image(image), self.config.vision, self.config.images)
            return self._prompter.item(full, patches, grid)
        except ItemError as error:
            raise type(error)(f"item {number}: {error}") from error

    def _start(
        self, items: list[Item], shape: RowShape | None, tokens: int
    ) -> tuple[RowShape, _Running]:
        """Start the computation of a window, in rows of a shape used before if they fit."""
        lengths = np.array([len(item.tokens) for item in items])
        patches = np.array([len(item.patches) for item in items])
        shape, placement = _place(lengths, patches, shape, tokens)
        rows = fill(items, placement, shape, self.config.vision)
        chunks = [
            _vectors()(self.params, jax.tree.map(operator.itemgetter(chunk), rows), self.compute)
            for chunk in range(placement.chunks)
        ]
        return shape, _Running(placement, chunks)


@dataclass(frozen=True)
class _Running:
    """Chunks that the device is working on."""

    placement: Placement
    vectors: list[Array]

    def finish(self, bar: tqdm) -> ndarray:
        """Wait for the chunks and return their vectors in the order of the items."""
        items = len(self.placement.chunk)
        out = np.empty((items, self.vectors[0].shape[-1]), np.float32)
        for chunk, vectors in enumerate(self.vectors):
            here = np.flatnonzero(self.placement.chunk == chunk)
            out[here] = np.asarray(vectors)[self.placement.slot[here]]
            bar.update(len(here))
        return out


@dataclass(frozen=True)
class _Unread:
    """Weights that have not been read yet, and how they shall be."""

    checkpoint: hf.Checkpoint
    layers: tuple[int, ...]
    dtype: str
    placement: hf.Placement | None

    def read(self) -> Encoder:
        return self.checkpoint.read(self.layers, dtype=self.dtype, placement=self.placement)


def _checked(item: RawItem) -> tuple[str | None, ImageSource | None]:
    """Return the text and the image of an item, which are what they should be."""
    unknown = set(item) - {"text", "image"}
    if unknown:
        raise ItemError(f"unknown fields {sorted(unknown)}, expected text and image")
    text, image = item.get("text"), item.get("image")
    if text is None and image is None:
        raise ItemError("neither text nor image")
    if not isinstance(text, str | None):
        raise ItemError(f"text is a {type(text).__name__}, expected a str")
    if not isinstance(image, ImageSource | None):
        raise ImageError(
            f"image is a {type(image).__name__}, expected a path, bytes, a PIL image or an array"
        )
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ItemError(f"text is not valid Unicode: {error.reason}") from None
    return text, image


def _place(
    lengths: ndarray, patches: ndarray, shape: RowShape | None, tokens: int
) -> tuple[RowShape, Placement]:
    if shape is not None:
        # Items larger than those the shape was made for ask for another one.
        with contextlib.suppress(PackingError):
            return shape, place(lengths, patches, shape)
    shape = fitting_shape(lengths, patches, tokens)
    return shape, place(lengths, patches, shape)
