"""Adapters in the format of PEFT: read, to be merged or trained further.

A folder holds adapter_config.json and adapter_model.safetensors, with the matrices A and B of every
adapted linear of the transformers model. Which linears are adapted is read from the names of the
tensors; `target_modules`, a list, a pattern or "all-linear", is what they were chosen by. A folder
that this package wrote has a third file, puma_jax.json: the prompt, the image limits and the kept
layers of the model, as in config.json of a saved model.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np
from flax import nnx
from safetensors import safe_open

from puma_jax.config import LoraConfig, LoraTarget, ModelConfig, Width
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.files import read_json, read_object
from puma_jax.model import hf, lora
from puma_jax.model.encoder import Encoder
from puma_jax.model.families import family_of
from puma_jax.model.hub_folder import Tensor, UnusedWeightsWarning, local_folder, tensors_of
from puma_jax.model.hub_schemas import SavedFields
from puma_jax.schema import Positive, from_json, shown
from puma_jax.typing import ndarray

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODEL = "puma_jax.json"

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What these say is in the tensors too, or matters before and in training alone.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
_MERGE = "merge it with peft (merge_and_unload) and load the model that this returns"


@dataclass(frozen=True)
class _Fields:
    """The fields of adapter_config.json that decide what an adapter computes."""

    peft_type: Literal["LORA"]
    r: Width
    lora_alpha: Positive
    use_rslora: bool = False
    # Other ways to draw A and B change the weights of the base model as well.
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] | None = True


@dataclass(frozen=True)
class Adapter:
    """An opened adapter on a model: names and shapes of its matrices, not their values."""

    folder: Path
    rank: int
    scale: float
    """Factor on A·B."""
    linears: Mapping[str, Mapping[int, tuple[str, str]]]
    """Path of a linear of the model → number of its layer (0 if it has none) → names of A and B in
    the file."""
    saved: SavedFields | None
    """Prompt, image limits and kept layers of the model that this package trained it on."""

    def lora_config(self, dropout: float) -> LoraConfig:
        """Return the settings with which a stage trains the adapter further.

        Raises:
            ConfigError: It adapts other linears than those of the decoder.
        """
        names = {path: path.rpartition(".")[2] for path in self.linears}
        for path in names:
            if not path.startswith("decoder."):
                raise ConfigError(
                    f"{self.folder} adapts {path}, and stages train adapters on the decoder alone: "
                    "merge it first, with python -m puma_jax.export huggingface --adapter"
                )
        targets = tuple(name for name in get_args(LoraTarget) if name in names.values())
        return LoraConfig(self.rank, self.scale * self.rank, dropout, targets)

    def with_inputs(self, config: ModelConfig) -> ModelConfig:
        """Return the config of the model with what the adapter was trained with, if it says so.

        That is prompt, limits, widths, depths and kind of attention.
        """
        saved = self.saved
        if saved is None:
            return config
        decoder = config.decoder
        if saved.causal is not None:
            decoder = dataclasses.replace(decoder, causal=saved.causal)
        return dataclasses.replace(
            config,
            prompt=saved.prompt,
            images=saved.images or config.images,
            widths=saved.widths,
            exit_layers=saved.exit_layers,
            decoder=decoder,
        )

    def add_to(
        self,
        params: Encoder,
        layers: Sequence[int],
        *,
        shardings: hf.Shardings,
        dropout: float = 0.0,
    ) -> Encoder:
        """Return the model with the adapter's A and B beside the kernels, float32.

        Layers that the adapter leaves out get zeros.

        Args:
            params: The model, of these layers.
            layers: Number in the whole model of each decoder layer of `params`.
            shardings: Where the arrays live, as in `Checkpoint.read`.
            dropout: Dropout of the adapter in training.

        Raises:
            CheckpointError: A value is not finite.
        """
        params = lora.copy(params)
        linears = dict(lora.linears(params))
        with safe_open(self.folder / WEIGHTS, "numpy") as file:
            for path, names in self.linears.items():
                linear = linears[path]
                *stack, inputs, outputs = linear.kernel.shape
                a = np.zeros((*stack, inputs, self.rank), np.float32)
                b = np.zeros((*stack, self.rank, outputs), np.float32)
                numbers = layers if path.startswith("decoder.") else range(*(stack or [1]))
                for slot, number in enumerate(numbers):
                    if number in names:
                        at = slot if stack else ...
                        a[at], b[at] = (_read(file, name, self.folder) for name in names[number])
                linear.lora_a = _placed(a, f"{path}.lora_a", shardings)
                linear.lora_b = _placed(b, f"{path}.lora_b", shardings)
                linear.lora_scale, linear.lora_dropout = self.scale, dropout
        return params

    def merge_into(
        self, params: Encoder, layers: Sequence[int], *, shardings: hf.Shardings
    ) -> Encoder:
        """Return the model with the adapter merged, every leaf where it was; see `add_to`."""
        merged = lora.merge(self.add_to(params, layers, shardings=shardings))
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), merged, params)


def open_adapted(
    location: str | os.PathLike[str], adapter: str | os.PathLike[str] | None
) -> tuple[hf.Checkpoint, Adapter | None]:
    """Open a model and, if one is given, an adapter on it, whose prompt and image limits hold.

    Args:
        location: Hugging Face folder or hub id of the model.
        adapter: PEFT folder or hub id of the adapter.

    Raises:
        CheckpointError: A folder does not hold what it says, or the adapter is of another model or
            of a kind that is not supported.
        UnknownModelError: No family has the model's model_type.
    """
    checkpoint = hf.open_checkpoint(location)
    if adapter is None:
        return checkpoint, None
    opened = open_adapter(adapter, checkpoint.config)
    config = opened.with_inputs(checkpoint.config)
    return dataclasses.replace(checkpoint, config=config), opened


def open_adapter(location: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Open a PEFT folder, or fetch one from the hub, and check that it fits a model.

    Raises:
        CheckpointError: A file is missing or broken, the adapter is of a kind that is not
            supported, or its tensors are not those of linears of the model; all of them are listed.
    """
    folder = local_folder(location)
    fields = _read_fields(folder / CONFIG)
    saved = None
    if (folder / MODEL).exists():
        saved = read_object(folder / MODEL, SavedFields, error=CheckpointError)
        if saved.kept_layers != config.kept_layers:
            kept = ",".join(map(str, saved.kept_layers))
            raise CheckpointError(
                f"{folder} was trained on layers {kept} of its base model, and the model given has "
                f"{','.join(map(str, config.kept_layers))}: prune the base model first, with "
                f"python -m puma_jax.prune --keep-layers {kept}"
            )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} lacks {WEIGHTS}: save the adapter as safetensors")
    linears = _linears(folder, config, fields.r, tensors_of(folder / WEIGHTS))
    root = math.sqrt(fields.r) if fields.use_rslora else fields.r
    return Adapter(folder, fields.r, fields.lora_alpha / root, linears, saved)


def _read_fields(path: Path) -> _Fields:
    """Return the settings of an adapter; a field that would change its result unread is refused."""
    found = read_json(path, error=CheckpointError)
    read = {field.name for field in dataclasses.fields(_Fields)}
    try:
        fields = from_json(_Fields, found, unknown="ignore")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; {_MERGE}") from None
    for name, value in found.items():
        without_effect = value in (None, False, "none", [], {})
        if name not in read and name not in _WITHOUT_EFFECT and not without_effect:
            raise CheckpointError(
                f"{path}: {shown(name)[1:-1]} {shown(value)} is not supported: {_MERGE}"
            )
    return fields


def _linears(
    folder: Path, config: ModelConfig, rank: int, found: Sequence[Tensor]
) -> dict[str, dict[int, tuple[str, str]]]:
    """Return `Adapter.linears`, and warn of adapters on a head, which an embedder has not."""
    family, shapes, places = family_of(config.family), hf.tensor_shapes(config), _places(config)
    sides: dict[str, dict[str, str]] = {}
    wrong, unused = [], []
    for tensor in found:
        parts = _TENSOR.fullmatch(tensor.name)
        key = family.hf_key(f"{parts[1]}.weight") if parts else ""
        if parts and (key in family.ignored or parts[1] == "lm_head"):
            unused.append(tensor.name)
        elif parts is None or key not in places:
            wrong.append(f"{shown(tensor.name)[1:-1]} has no place in this model")
        elif parts[2] in sides.setdefault(key, {}):
            wrong.append(f"{tensor.name} is there twice, also as {sides[key][parts[2]]}")
        else:
            sides[key][parts[2]] = tensor.name
            outputs, inputs = shapes[key]
            expected = (rank, inputs) if parts[2] == "A" else (outputs, rank)
            wrong += hf.mismatches(tensor, tensor.name, expected)
    wrong += [
        f"{next(iter(names.values()))} is there without its other half"
        for names in sides.values()
        if len(names) == 1
    ]
    hf.refuse(folder, wrong)
    if not sides:
        raise CheckpointError(f"{folder / WEIGHTS} holds no adapter of this model")
    if unused:
        warnings.warn(
            f"{folder}: {len(unused)} tensors of the head are not read, such as {unused[0]}: an "
            "embedder has none",
            UnusedWeightsWarning,
            stacklevel=4,
        )
    linears: dict[str, dict[int, tuple[str, str]]] = {}
    for key, names in sides.items():
        path, number = places[key]
        linears.setdefault(path, {})[number] = (names["A"], names["B"])
    return linears


def _places(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Return the key of every linear's kernel → path of the linear, and number of its layer."""
    convolutions = family_of(config.family).disk_shapes(config)
    kernels = (name for name in family_of(config.family).weights if name.endswith(".kernel"))
    return {
        key: (name.removesuffix(".kernel"), number)
        for name in kernels
        for number, key in enumerate(hf.tensor_names(config, name, range(config.decoder.layers)))
        if key not in convolutions and key in hf.tensor_shapes(config)
    }


def _read(file: safe_open, name: str, folder: Path) -> ndarray:
    """Return the transpose of a tensor in float32."""
    try:
        return hf.cast(file.get_tensor(name), np.dtype(np.float32)).T
    except OverflowError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {name} {error}") from None


def _placed(values: ndarray, name: str, shardings: hf.Shardings) -> nnx.LoRAParam:
    leaf = jax.ShapeDtypeStruct(values.shape, values.dtype)
    sharding = shardings(name, leaf) if callable(shardings) else shardings
    return nnx.LoRAParam(
        jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    )
