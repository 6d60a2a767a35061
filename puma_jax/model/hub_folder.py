"""The files of a Hugging Face folder: where it is, its configs, and the tensors that it lists."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from puma_jax.config import ModelConfig
from puma_jax.errors import CheckpointError, ConfigError, LayerSelectionError
from puma_jax.files import read_json, read_object
from puma_jax.model.families import CONFIG_KEY, family_of
from puma_jax.model.hub_schemas import TokenizerFields, WeightIndex
from puma_jax.schema import from_json, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
# A folder name and a model name, as the hub has them: what begins with a dot is a path.
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![.-])", re.ASCII)
_MOST_LISTED = 20


class UnusedWeightsWarning(UserWarning):
    """A model folder holds weights, beside those of the model, that are not read."""


@dataclass(frozen=True)
class HubConfigs:
    """The JSON files beside the weights of a base model, as they were read."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """config.json"""
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    """preprocessor_config.json, or what processor_config.json has in its place"""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json"""
    pooling: Mapping[str, Any] = field(default_factory=dict)
    """1_Pooling/config.json of Sentence Transformers"""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file, as its header has it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def local_folder(location: str | os.PathLike[str]) -> Path:
    """Return a model's folder, fetched from the hub if it is not here.

    Raises:
        CheckpointError: There is none.
    """
    folder = Path(os.path.expanduser(location))
    if os.path.isdir(folder):  # unlike Path.is_dir, no name that a user can type raises
        return folder
    if not _HUB_ID.fullmatch(str(location)):
        raise CheckpointError(f"{folder} is not a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(str(location), allow_patterns=list(_HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{location} is neither a folder here nor available from the hub: {reason}"
        ) from None


def read_config(folder: Path, name: str = "") -> tuple[ModelConfig, HubConfigs]:
    """Return the config of the model in a folder, and the files it was read from.

    A model that this package saved says itself how it is prompted and pooled (`puma_jax` in
    config.json). Any other is a base model that is to be trained with PUMA's prompt, unless it is a
    published embedder: a model of a family that has one (`Family.embedder`), in a folder whose
    Sentence Transformers config pools the last token, or that has the name of the embedder. Then
    its own prompt, pooling and image sizes hold.

    Args:
        folder: The folder.
        name: Last part of its hub id or path as the user gave it; the folder's name by default.

    Raises:
        CheckpointError: config.json is missing, or a file is broken.
        UnknownModelError: No family has its model_type.
    """
    source = HubConfigs(
        _read_model_json(folder),
        _read_image_processor(folder),
        _read_optional(folder / "tokenizer_config.json"),
        _read_optional(folder / "1_Pooling/config.json"),
    )
    family = family_of(str(source.model.get("model_type")))
    try:
        from_json(TokenizerFields, source.tokenizer, "tokenizer_config.json", unknown="ignore")
        config = family.read_config(source.model, source.preprocessor)
        if CONFIG_KEY not in source.model and family.embedder is not None:
            named = family.embedder.name in (name or folder.name)
            if named or _pools_last_token(source.pooling):
                config = family.embedder.configure(config)
        return config, source
    except (ConfigError, LayerSelectionError) as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _pools_last_token(pooling: Mapping[str, Any]) -> bool:
    """Return whether Sentence Transformers pools the last token; it had a flag for each mode."""
    return pooling.get("pooling_mode") == "lasttoken" or (
        pooling.get("pooling_mode_lasttoken") is True
    )


def _read_model_json(folder: Path) -> dict[str, Any]:
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").exists():
        base = _read_optional(adapter).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder} holds an adapter of PEFT for {shown(base)}, not a model: load that model, "
            "and this folder as its adapter (--adapter)"
        )
    return read_json(folder / "config.json", error=CheckpointError)


def _read_image_processor(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor, from the file that transformers prefers."""
    path = folder / "processor_config.json"
    nested = _read_optional(path).get("image_processor")
    if nested is None:
        return _read_optional(folder / "preprocessor_config.json")
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path}: image_processor {shown(nested)} is not an object")
    return nested


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, error=CheckpointError) if path.exists() else {}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, all of them present.

    The single file comes before an index, as in transformers. Other weights beside those of the
    model are warned of: one of the two is outdated.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        files = [single]
    elif index.exists():
        files = _indexed_files(index)
    elif any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds weights of PyTorch (.bin), not safetensors: load it in transformers "
            "and save it once with save_pretrained"
        )
    else:
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    unused = sorted(path.name for path in folder.glob("*.safetensors") if path not in files)
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(
            f"{folder}: {', '.join(unused[:3])}{more} {'is' if len(unused) == 1 else 'are'} not "
            f"read, the model is in {files[0].name if len(files) == 1 else INDEX}",
            UnusedWeightsWarning,
            stacklevel=2,
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_object(index, WeightIndex, error=CheckpointError, unknown="ignore").weight_map
    if not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if re.search(r"[/\\\0]", name) or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: {shown(name)} is not the name of a file beside it")
    # Unlike Path.is_file, no name is too long for it.
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        listed = ", ".join(shown(name)[1:-1] for name in missing[:_MOST_LISTED])
        raise CheckpointError(f"{index.parent} lacks {len(missing)} shards: {listed}")
    return [index.parent / name for name in names]


def tensors_of(path: Path) -> list[Tensor]:
    """Return what the header of a safetensors file lists."""
    try:
        with safe_open(path, "numpy") as file:
            return [
                Tensor(path, name, tuple(part.get_shape()), part.get_dtype())
                for name in file.keys()  # noqa: SIM118
                for part in [file.get_slice(name)]
            ]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not safetensors: {error}") from None
