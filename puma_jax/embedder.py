"""Embedder: loads a model folder, prunes layers, encodes texts and images, saves."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from puma_jax.artifacts import atomic_folder
from puma_jax.config import (
    ComputeConfig,
    DType,
    ImageConfig,
    ModelConfig,
    PromptConfig,
    require,
)
from puma_jax.data.items import Item
from puma_jax.data.preparing import prepare, run
from puma_jax.data.prompts import Processor
from puma_jax.data.raw_items import RawItem, check_text, checked
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.data.videos import read_visuals
from puma_jax.errors import ItemError
from puma_jax.forward import Forward, Running, check_vectors, first_values, shape_for
from puma_jax.model import encoder, hf
from puma_jax.model.encoder import Encoder
from puma_jax.model.peft import Adapter, open_adapted
from puma_jax.model.tree import named_leaves
from puma_jax.parallel import rules
from puma_jax.parallel.mesh import data_shards
from puma_jax.progress import Progress
from puma_jax.rows import PackedShape
from puma_jax.schema import shown
from puma_jax.typing import Float, ndarray

# Items are packed this many chunks at a time: more chunks leave less padding.
_CHUNKS_IN_WINDOW = 8
_ITEMS_BETWEEN_LOOKS = 64
_SECONDS_UNTIL_BAR = 2.0


class Embedder:
    """Turns texts, images, and images with text into vectors of one space."""

    def __init__(
        self,
        config: ModelConfig,
        params: Encoder | LazyParams,
        tokenizer: PreTrainedTokenizerFast,
        *,
        compute: ComputeConfig | None = None,
        mesh: Mesh | None = None,
        source: hf.HubConfigs | None = None,
    ):
        """Wrap a model; most callers want `Embedder.load`.

        Args:
            config: Config of the model.
            params: Weights of the model, read or not yet read.
            tokenizer: Fast tokenizer of the model; [RET] is added to it if the model pools there.
            compute: How to run; bfloat16 by default.
            mesh: Devices that hold the weights and share the work; None for a single device.
            source: Configs that came with the model; `save` keeps their other fields.
        """
        self.config = config
        self.compute = compute or ComputeConfig()
        self.mesh = mesh
        self._params = params
        self._processor = Processor(tokenizer, config)
        self._source = source or hf.HubConfigs()
        self._known_shapes: list[PackedShape] = []

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: DType | None = "bfloat16",
        compute: ComputeConfig | None = None,
        images: ImageConfig | None = None,
        prompt: PromptConfig | None = None,
        ret_token: str | None = None,
        mesh: Mesh | None = None,
        adapter: str | os.PathLike[str] | None = None,
    ) -> Embedder:
        """Open a model; its weights are read when they are first needed.

        Thus `Embedder.load(...).keep_layers(12)` never reads the removed layers. A folder says
        itself how its model is prompted and pooled, and a published embedder is recognized; see
        `hub_folder.read_config`.

        Args:
            source: Hugging Face folder or hub id.
            dtype: Dtype of weights and activations; None keeps the dtype of the files.
            compute: How to run; the default takes its dtype from `dtype`.
            images: Limits on image sizes; None takes those of the model, or PUMA's.
            prompt: Prompt of the model; None takes the model's own, or PUMA's.
            ret_token: Token that ends every item, in place of the prompt's; for tokenizers whose
                token table has no row for a new token.
            mesh: Devices that share the work, from `parallel.mesh.make_mesh`; each reads its part
                of the weights, by `parallel.rules`. None uses the first device.
            adapter: PEFT folder or hub id of an adapter on the model, which is merged when the
                weights are read; see `peft.open_adapter`.

        Raises:
            ConfigError: `dtype` is not supported, or the model pools without a `ret_token`.
            CheckpointError: The folder does not hold a whole model; see `hf.open_checkpoint`.
            UnknownModelError: No family supports its model_type.
        """
        if dtype is not None:
            require(
                dtype in get_args(DType),
                f"dtype {shown(dtype)} is not one of {', '.join(get_args(DType))}",
            )
        checkpoint, opened = open_adapted(source, adapter)
        prompt = prompt or checkpoint.config.prompt
        if ret_token is not None:
            require(
                prompt.pooling == "ret",
                f"ret_token {shown(ret_token)} has no place in this model: its pooling is "
                f'"{prompt.pooling}"',
            )
            prompt = dataclasses.replace(prompt, ret_token=ret_token)
        config = dataclasses.replace(
            checkpoint.config, images=images or checkpoint.config.images, prompt=prompt
        )
        dtype = dtype or checkpoint.dtype
        layers = tuple(range(config.decoder.layers))
        return cls(
            config,
            LazyParams(dataclasses.replace(checkpoint, config=config), layers, dtype, mesh, opened),
            load_tokenizer(checkpoint.folder),
            compute=compute or ComputeConfig(dtype=dtype),
            mesh=mesh,
            source=checkpoint.source,
        )

    @property
    def params(self) -> Encoder:
        """The weights; the first access reads them."""
        if isinstance(self._params, LazyParams):
            self._params = self._params.read()
        return self._params

    @params.setter
    def params(self, params: Encoder) -> None:
        self._params = params

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, with [RET] if the model pools there."""
        return self._processor.tokenizer

    @property
    def embedding_dim(self) -> int:
        """The number of values in a vector."""
        return self.config.decoder.width

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 digest of config, tokenizer and weights, which identifies the model."""
        digest = hashlib.sha256(repr(self.config).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        for name, leaf in named_leaves(self.params).items():
            digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
        return digest.hexdigest()

    def keep_layers(self, keep: int | Sequence[int]) -> Embedder:
        """Return an embedder with only some of the decoder layers; see `encoder.keep_layers`.

        It warns of a depth that a model trained for several (`config.exit_layers`) was not for.

        Raises:
            LayerSelectionError: `keep` is empty, repeats a layer or names one the model lacks.
        """
        params: Encoder | LazyParams
        if isinstance(self._params, LazyParams):
            chosen = encoder.layer_indices(keep, self.config.decoder.layers)
            config = self.config.with_layers(tuple(self.config.kept_layers[i] for i in chosen))
            layers = tuple(self._params.layers[i] for i in chosen)
            params = dataclasses.replace(self._params, layers=layers)
        else:
            config, params = encoder.keep_layers(self.config, self._params, keep)
        encoder.warn_if_untrained(self.config, config.kept_layers)
        return Embedder(
            config,
            params,
            self.tokenizer,
            compute=self.compute,
            mesh=self.mesh,
            source=self._source,
        )

    def preprocess(
        self, item: RawItem | str, instruction: str | None = None, *, truncate: bool = True
    ) -> Item:
        """Return the tokens of an item and the patches of its images.

        Args:
            item: Text, images or both.
            instruction: Instruction of a query; see `encode`.
            truncate: Whether to truncate a text of too many tokens, with a warning for the first.

        Raises:
            ItemError: The item has neither text nor image, or a field of the wrong kind.
            ImageError: An image cannot be read.
            LongTextError: Instruction and text have too many tokens, and are not to be truncated.
        """
        return run(self.preparing(item, instruction, truncate=truncate))

    async def preparing(
        self, item: RawItem | str, instruction: str | None = None, *, truncate: bool = True
    ) -> Item:
        """Return what `preprocess` does, as a coroutine for `data.preparing`."""
        parts = checked(item)
        own = parts.instruction
        if own is not None and instruction is not None:
            raise ItemError("an instruction is given with the item, and another one for all")
        instruction = own if instruction is None else instruction
        check_text("instruction", instruction)
        full = self._processor.read(parts.text, instruction)
        visuals = await read_visuals(parts, self.config.vision, self.config.images)
        return self._processor.item(full, visuals, instruction, truncate=truncate)

    def largest_item(self, *, images: int) -> tuple[int, int]:
        """Return the most tokens and patches that an item with so many images has."""
        return self._processor.largest_item(images=images)

    def shape_for(self, items: Sequence[Item], tokens_per_chunk: int | None = None) -> PackedShape:
        """Return the packed shape that items like these fill well; see `encode`."""
        return shape_for(items, tokens_per_chunk or _default_tokens(), self.mesh)

    def encode(
        self,
        items: Iterable[RawItem | str | Item],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        tokens_per_chunk: int | None = None,
        shape: PackedShape | None = None,
        progress: bool = True,
        name: Callable[[int], str] | None = None,
        normalize: bool = True,
    ) -> Float[ndarray, "n width"]:
        """Return one unit vector per item, in the order of the items.

        The vector of an item does not depend on the other items, except for rounding.

        Args:
            items: Any number of items, each a text or {"text": ..., "image": ...}, whose image may
                be a list of images; an iterable is read as it is needed. Items from `preprocess`
                have their instruction already.
            instruction: Instruction of queries, put before the text of every item, such as "Find an
                image that matches."; None for candidates.
            dimensions: Number of values in a vector: the first ones, scaled to length 1; None
                returns all. A model does well at the widths it was trained for, `config.widths`.
            tokens_per_chunk: About how many tokens a device reads in one forward pass; the default
                is 2,048 on a CPU and 16,384 on an accelerator.
            shape: Packed shape to use where items fit, so that several calls share one compilation
                and pack items alike; see `shape_for`. By default the first items decide.
            progress: Whether to show a progress bar if the work takes more than two seconds.
            name: Returns what a message calls the item of a number; "item 3" by default.
            normalize: Whether to scale vectors to length 1.

        Raises:
            ConfigError: See `check_dimensions`.
            EvaluationError: A vector is not finite, or zero.
            ItemError: An item has neither text nor image, or a field of the wrong kind.
            ImageError: An image cannot be read.
        """
        if isinstance(items, str | Mapping | Item):
            raise ItemError(
                "encode takes a list of items and was given a single one: encode([item])[0] is its "
                "vector"
            )
        self.check_dimensions(dimensions)
        tokens = tokens_per_chunk or _default_tokens()
        window_tokens = tokens * _CHUNKS_IN_WINDOW * (data_shards(self.mesh) if self.mesh else 1)
        forward = Forward(
            self.params, self.config.vision, self.compute, self.mesh, self._known_shapes, normalize
        )
        bar = Progress(
            total=len(items) if isinstance(items, Sequence) else None,
            unit="item",
            delay=_SECONDS_UNTIL_BAR,
            disable=not progress,
        )
        vectors = [np.zeros((0, self.embedding_dim), np.float32)]
        with bar:
            running: Running | None = None
            for window in self._windows(items, instruction, window_tokens):
                # The device encodes this window while the host preprocesses the next one.
                shape, started = forward.start(window, shape, tokens)
                if running is not None:
                    vectors.append(running.finish(bar.update))
                running = started
            if running is not None:
                vectors.append(running.finish(bar.update))
        result = np.concatenate(vectors)
        name = name or "item {}".format
        check_vectors(result, name)
        return result if dimensions is None else first_values(result, dimensions, name)

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise a ConfigError for a number of values that vectors do not have; None means all."""
        require(
            dimensions is None or 1 <= dimensions <= self.embedding_dim,
            f"dimensions {dimensions} must be in [1, {self.embedding_dim}]",
        )

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_bytes: int = 4 * 2**30,
        backbone: bool = False,
    ) -> None:
        """Write a Hugging Face folder that transformers and this class load.

        The folder is written atomically.

        Args:
            folder: Folder to write; it must not exist, or be empty.
            max_shard_bytes: Maximum size of a file of weights, in bytes; 4 GiB by default.
            backbone: Whether to name weights as transformers' AutoModel does, rather than its
                model class for generation. This class loads both.

        Raises:
            ArtifactError: The folder is not empty, or cannot be written.
        """
        with atomic_folder(Path(folder)) as unfinished:
            hf.write_checkpoint(
                unfinished,
                self.config,
                self.params,
                self._source,
                max_shard_bytes=max_shard_bytes,
                backbone=backbone,
            )
            self._processor.save_tokenizer(unfinished, self._source.tokenizer)

    def _windows(
        self,
        items: Iterable[RawItem | str | Item],
        instruction: str | None,
        tokens: int,
    ) -> Iterator[list[Item]]:
        """Yield preprocessed items in windows of about `tokens` tokens."""
        preparing = functools.partial(self._preparing_numbered, instruction=instruction)
        preprocessed = prepare(preparing, enumerate(items))
        window: list[Item] = []
        while batch := list(itertools.islice(preprocessed, _ITEMS_BETWEEN_LOOKS)):
            window += batch
            if sum(len(item.tokens) for item in window) >= tokens:
                yield window
                window = []
        if window:
            yield window

    async def _preparing_numbered(
        self, numbered: tuple[int, RawItem | str | Item], instruction: str | None
    ) -> Item:
        """Return a preprocessed item; an error names the item by its number."""
        number, item = numbered
        if isinstance(item, Item):
            return item
        try:
            return await self.preparing(item, instruction)
        except ItemError as error:
            raise type(error)(f"item {number}: {error}") from error


@dataclass(frozen=True)
class LazyParams:
    """Weights that are not read yet, and how to read them."""

    checkpoint: hf.Checkpoint
    layers: tuple[int, ...]
    dtype: str
    mesh: Mesh | None
    adapter: Adapter | None = None
    """An adapter to merge into them."""

    def read(self) -> Encoder:
        """Read the weights, each device its part, and return the model."""
        shardings: hf.Shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if self.mesh is not None:
            shardings = rules.sharding_fn(self.mesh, self.checkpoint.config)
        params = self.checkpoint.read(self.layers, dtype=self.dtype, shardings=shardings)
        if self.adapter is None:
            return params
        return self.adapter.merge_into(params, self.layers, shardings=shardings)


def _default_tokens() -> int:
    return 2048 if jax.default_backend() == "cpu" else 16384
