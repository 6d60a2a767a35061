"""Embedder: a model folder in, vectors out. The face most people will ever see."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from puma_jax.config import ComputeConfig, DType, ImageConfig, ModelConfig, PromptConfig
from puma_jax.data.images import ImageSource, open_image, patchify
from puma_jax.data.items import Item
from puma_jax.data.prompts import Prompter, load_tokenizer, query_text
from puma_jax.errors import CheckpointError, ImageError, ItemError
from puma_jax.forward import Forward, Running, shape_for
from puma_jax.model import encoder, hf
from puma_jax.model.encoder import Encoder
from puma_jax.model.tree import named_leaves
from puma_jax.parallel import rules
from puma_jax.parallel.mesh import groups
from puma_jax.rows import RowShape
from puma_jax.typing import Float, ndarray

RawItem = Mapping[str, Any]
"""{"text": str}, {"image": path, bytes, PIL image or uint8 array}, or both."""

# Items are placed this many chunks at a time: the more, the tighter.
_CHUNKS_IN_WINDOW = 8
_PREPARED_AT_ONCE = 64
_SECONDS_UNTIL_BAR = 2.0


class Embedder:
    """Turns texts, images, and images with text into vectors of one space."""

    def __init__(
        self,
        config: ModelConfig,
        params: Encoder | _Unread,
        tokenizer: PreTrainedTokenizerFast,
        *,
        compute: ComputeConfig | None = None,
        mesh: Mesh | None = None,
        source: hf.HubConfigs | None = None,
    ):
        """Wrap a model; most callers want `Embedder.load`.

        Args:
            config: Of the model.
            params: The model.
            tokenizer: A fast tokenizer; [RET] is added to it.
            compute: How to run; bfloat16 if not given.
            mesh: Whose devices share the work, and hold the weights; None for one device.
            source: The configs the model came with, whose other fields `save` keeps.
        """
        self.config = config
        self.compute = compute or ComputeConfig()
        self.mesh = mesh
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
        mesh: Mesh | None = None,
    ) -> Embedder:
        """Open a model; its weights are read when they are first needed.

        So `Embedder.load(...).keep_layers(12)` never reads the layers that are cut.

        Args:
            source: A Hugging Face folder or hub id.
            dtype: Of weights and activations; None keeps the dtype of the files.
            compute: How to run; the default takes its dtype from `dtype`.
            images: Limits on image sizes; None takes those saved with the model, or PUMA's.
            prompt: How items are worded; None takes what was saved with the model, or PUMA's.
            mesh: Whose devices share the work, from `parallel.mesh.make_mesh`; each reads its part
                of the weights, by `parallel.rules`. None puts everything on the first device.

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
            _Unread(checkpoint, layers, dtype, mesh),
            load_tokenizer(checkpoint.folder),
            compute=compute or ComputeConfig(dtype=dtype),
            mesh=mesh,
            source=checkpoint.source,
        )

    @property
    def params(self) -> Encoder:
        """The weights, read now if they have not been."""
        if isinstance(self._params, _Unread):
            self._params = self._params.read()
        return self._params

    @params.setter
    def params(self, params: Encoder) -> None:
        self._params = params

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, with [RET]."""
        return self._prompter.tokenizer

    @property
    def width(self) -> int:
        """Values in a vector."""
        return self.config.decoder.width

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this model from every other: a digest of config, tokenizer and weights."""
        digest = hashlib.sha256(repr(self.config).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        for name, leaf in named_leaves(self.params).items():
            digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
        return digest.hexdigest()

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
            mesh=self.mesh,
            source=self._source,
        )

    def prepare(self, item: RawItem, instruction: str | None = None) -> Item:
        """Return an item as the model reads it: tokens, and the patches of its image.

        Args:
            item: A text, an image or both.
            instruction: See `encode`.

        Raises:
            ItemError: It has neither text nor image, or a field of the wrong kind.
            ImageError: Its image cannot be read.
        """
        text, image = _checked(item)
        full = query_text(instruction, text)
        if image is None:
            return self._prompter.item(full)
        patches, grid = patchify(open_image(image), self.config.vision, self.config.images)
        return self._prompter.item(full, patches, grid)

    def shape_for(self, items: Sequence[Item], tokens_per_chunk: int | None = None) -> RowShape:
        """Return the shape of rows that items like these fill well; see `encode`."""
        return shape_for(items, tokens_per_chunk or _default_tokens(), self.mesh)

    def encode(
        self,
        items: Iterable[RawItem | Item],
        *,
        instruction: str | None = None,
        tokens_per_chunk: int | None = None,
        shape: RowShape | None = None,
        progress: bool = True,
    ) -> Float[ndarray, "n width"]:
        """Return one unit vector for each item, in their order.

        An item's vector does not depend on its neighbours (but for rounding).

        Args:
            items: Any number of items; an iterable is read as it is needed. Those that `prepare`
                returned have their instruction already.
            instruction: What is looked for, put before the text of every item; for queries.
            tokens_per_chunk: About how many tokens a device reads in one forward pass. The default
                is small on a CPU and large on an accelerator.
            shape: Of rows to use where items fit, so that several calls share one compilation, and
                an item's rows do not depend on the calls before; see `shape_for`.
            progress: Whether to show a bar when the work takes more than a few seconds.

        Raises:
            ItemError: An item has neither text nor image, or a field of the wrong kind.
            ImageError: An image cannot be read.
        """
        tokens = tokens_per_chunk or _default_tokens()
        window_tokens = tokens * _CHUNKS_IN_WINDOW * (groups(self.mesh) if self.mesh else 1)
        forward = Forward(self.params, self.config.vision, self.compute, self.mesh)
        bar = tqdm(
            total=len(items) if isinstance(items, Sequence) else None,
            unit="item",
            delay=_SECONDS_UNTIL_BAR,
            disable=not progress,
        )
        vectors = [np.zeros((0, self.width), np.float32)]
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            running: Running | None = None
            for window in self._windows(items, instruction, window_tokens, pool):
                # The device works on this window while the host prepares the next one.
                shape, started = forward.start(window, shape, tokens)
                if running is not None:
                    vectors.append(running.finish(bar.update))
                running = started
            if running is not None:
                vectors.append(running.finish(bar.update))
        return np.concatenate(vectors)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_bytes: int = 4 * 2**30,
        headless: bool = False,
    ) -> None:
        """Write a Hugging Face folder that transformers and this class load.

        The folder appears whole or not at all.

        Args:
            folder: Must not exist, or be empty.
            max_shard_bytes: Weights are split into files of at most this size.
            headless: Whether to name weights as transformers' AutoModel does, which is for
                encoders, rather than as models that write text do. This class loads both.

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
                unfinished,
                self.config,
                self.params,
                self._source,
                max_shard_bytes=max_shard_bytes,
                headless=headless,
            )
            self._prompter.save_tokenizer(unfinished, self._source.tokenizer)
            unfinished.replace(folder)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{folder} cannot be written: {reason}") from error

    def _windows(
        self,
        items: Iterable[RawItem | Item],
        instruction: str | None,
        tokens: int,
        pool: ThreadPoolExecutor,
    ) -> Iterator[list[Item]]:
        """Yield prepared items, about so many tokens at a time."""
        numbered = enumerate(items)
        prepare = functools.partial(self._prepare_numbered, instruction=instruction)
        window: list[Item] = []
        while batch := list(itertools.islice(numbered, _PREPARED_AT_ONCE)):
            for item in pool.map(prepare, batch):
                window.append(item)
            if sum(len(item.tokens) for item in window) >= tokens:
                yield window
                window = []
        if window:
            yield window

    def _prepare_numbered(
        self, numbered: tuple[int, RawItem | Item], instruction: str | None
    ) -> Item:
        """Return a prepared item; an error says which one it is."""
        number, item = numbered
        if isinstance(item, Item):
            return item
        try:
            return self.prepare(item, instruction)
        except ItemError as error:
            raise type(error)(f"item {number}: {error}") from error


@dataclass(frozen=True)
class _Unread:
    """Weights that have not been read yet, and how they shall be."""

    checkpoint: hf.Checkpoint
    layers: tuple[int, ...]
    dtype: str
    mesh: Mesh | None

    def read(self) -> Encoder:
        where = rules.placement(self.mesh, self.checkpoint.config) if self.mesh else None
        return self.checkpoint.read(self.layers, dtype=self.dtype, placement=where)


def _default_tokens() -> int:
    return 2048 if jax.default_backend() == "cpu" else 16384


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
