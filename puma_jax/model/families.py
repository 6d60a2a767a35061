"""Families of base models: a tower, if any, a reading of its config, a table of weight names.

To add one, write a module like `qwen2_vl.py` and name it in `FAMILIES`. Nothing else asks which
family a model belongs to.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from puma_jax.config import ModelConfig
from puma_jax.errors import UnknownModelError
from puma_jax.schema import shown

# model_type of a Hugging Face config → module that defines FAMILY
FAMILIES = {
    "qwen2_vl": "puma_jax.model.qwen2_vl",
    "qwen2_5_vl": "puma_jax.model.qwen2_5_vl",
    "qwen3_vl": "puma_jax.model.qwen3_vl",
    "qwen2": "puma_jax.model.qwen2",
    "qwen3": "puma_jax.model.qwen3",
    "llama": "puma_jax.model.llama",
}

# module of the families that are composed of two of these
COMPOSED = "puma_jax.model.composed"

# Key in a saved config.json for what transformers has no field for.
CONFIG_KEY = "puma_jax"


@dataclass(frozen=True)
class PublishedEmbedder:
    """An embedder that is published in the format of a base model."""

    name: str
    """Part of the name of its folder or hub id, by which it is recognized."""
    configure: Callable[[ModelConfig], ModelConfig]
    """Config of a base model → the same with the embedder's prompt, pooling and image sizes."""


@dataclass(frozen=True)
class Family:
    """How models of a family are read, run and written."""

    tower: Callable[..., Any] | None
    """The vision tower, `tower(config.vision, rngs)`. Called with packed patch rows, it returns the
    visual tokens and after them, if there are any, the features that the decoder adds to the
    visual tokens after each of its first layers. None for models of texts only."""
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any]], ModelConfig]
    """Contents of config.json and settings of the image processor → config, or ConfigError."""
    write_config: Callable[[ModelConfig, Mapping[str, Any]], dict[str, Any]]
    """Config and the config.json it came from → the config.json that transformers reads."""
    write_preprocessor: Callable[[ModelConfig, Mapping[str, Any]], dict[str, Any]]
    """Config and the preprocessor_config.json it came from → the one that transformers reads."""
    weights: Mapping[str, str]
    """Path of a leaf → its name in a safetensors file; "{}" stands for the layer's number."""
    disk_shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    """Keys of tensors that have more axes on disk than the matrix in memory → shape on disk."""
    hf_key: Callable[[str], str]
    """Name as any generation of transformers wrote it → the Hugging Face key used in `weights`."""
    backbone_key: Callable[[str], str]
    """Key used in `weights` → the key in the model without a head, which AutoModel opens."""
    backbone_architecture: str | None
    """Class in transformers of the model without a head; None for what transformers lacks."""
    ignored: tuple[str, ...]
    """Keys that a checkpoint may hold and an embedder does not need."""
    published: Mapping[str, ModelConfig]
    """Hub id → config of a published model, for work that needs shapes and no weights."""
    embedder: PublishedEmbedder | None = None
    """The published embedder of this family, see `hub_folder.read_config`."""


@functools.cache
def family_of(model_type: str) -> Family:
    """Return the family of a `model_type`, see `FAMILIES` and `composed.composed_family`.

    Raises:
        UnknownModelError: No family of that name.
    """
    if "+" in model_type:
        return importlib.import_module(COMPOSED).composed_family(model_type)
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnknownModelError(f"model_type {shown(model_type)} is not one of {known}")
    return importlib.import_module(FAMILIES[model_type]).FAMILY


def published() -> dict[str, ModelConfig]:
    """Return the published models of all families by hub id, see `Family.published`."""
    return {
        name: config
        for model_type in FAMILIES
        for name, config in family_of(model_type).published.items()
    }
