"""Read and write Hugging Face folders, one leaf at a time.

Opening a folder checks names, shapes and file lengths and reads no weights. Layers can therefore be
pruned before reading, and layers that are not kept cost nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from puma_jax.artifacts import write_json
from puma_jax.config import DType, ModelConfig
from puma_jax.errors import CheckpointError
from puma_jax.files import save_tensors
from puma_jax.model.encoder import Encoder, abstract, layer_indices
from puma_jax.model.families import family_of
from puma_jax.model.hub_folder import (
    INDEX,
    SINGLE,
    HubConfigs,
    Tensor,
    local_folder,
    read_config,
    tensors_of,
    weight_files,
)
from puma_jax.model.tree import map_named, named_leaves
from puma_jax.schema import shown
from puma_jax.typing import ndarray

Shardings = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
"""One sharding for all leaves, or a function from the name and shape of a leaf to its sharding."""

_MOST_LISTED = 20
_BLOCK_ROWS = 256
# Of integers and of float8, the values are codes that mean nothing without their scales.
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """An opened Hugging Face folder: names, shapes and files of its weights, not their values."""

    folder: Path
    config: ModelConfig
    source: HubConfigs
    files: dict[str, tuple[Path, str]]
    """Hugging Face key of a tensor → the file that holds it and its name in that file."""

    @property
    def dtype(self) -> DType:
        """The dtype that config.json names, or float32, which holds every other one."""
        model = self.source.model
        named = model.get("dtype") or model.get("torch_dtype")
        return "bfloat16" if named == "bfloat16" else "float32"

    def read(
        self,
        keep: int | Sequence[int] | None = None,
        *,
        dtype: str = "bfloat16",
        shardings: Shardings | None = None,
    ) -> Encoder:
        """Return the model, its weights read straight into arrays of the given dtype and shardings.

        Host memory holds one leaf at a time beside the arrays themselves; a device that holds
        part of a leaf reads that part only.

        Args:
            keep: Layers to read, as in `encoder.keep_layers`; None reads all.
            dtype: Dtype of the arrays, whatever the files hold.
            shardings: Where the arrays live; None puts everything on the first device.

        Raises:
            CheckpointError: A value is not finite, or is too large for `dtype`.
        """
        layers = self.config.decoder.layers
        chosen = tuple(range(layers)) if keep is None else layer_indices(keep, layers)
        kept = tuple(self.config.kept_layers[index] for index in chosen)
        if shardings is None:
            shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def read_leaf(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            sharding = shardings(name, leaf) if callable(shardings) else shardings

            def read_part(index: Any) -> ndarray:
                return self.read_part(name, index, leaf, chosen)

            return jax.make_array_from_callback(leaf.shape, sharding, read_part)

        return map_named(read_leaf, abstract(self.config.with_layers(kept), dtype))

    def read_part(
        self,
        name: str,
        index: tuple[slice, ...],
        leaf: jax.ShapeDtypeStruct,
        layers: Sequence[int] | None = None,
    ) -> ndarray:
        """Return `leaf[index]`, read from the one tensor or the stack of tensors it is made of.

        Args:
            name: Name of the leaf.
            index: A slice for each axis of the leaf.
            leaf: Shape of the leaf, and dtype of the result.
            layers: Decoder layers that the leaf has, if it has layers; None for all.

        Raises:
            CheckpointError: A value is not finite, or is too large for the dtype.
        """
        tensors = tensor_names(
            self.config, name, range(self.config.decoder.layers) if layers is None else layers
        )
        ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
        part = np.empty([len(one) for one in ranges], leaf.dtype)
        if stacked(name):
            slots, tensors, index = part, tensors[index[0]], index[1:]
        else:
            slots = part[None]
        # Files are closed after each leaf: pages of a mapped file count as memory in use.
        with contextlib.ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for slot, tensor in zip(slots, tensors, strict=True):
                path, stored = self.files[tensor]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, "numpy"))
                try:
                    _copy(opened[path].get_slice(stored), index, slot, transposed=_is_kernel(name))
                except OverflowError as error:
                    raise CheckpointError(f"{path}: {stored} {error}") from None
        return part


def open_checkpoint(location: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder, or fetch one from the hub, and check that it is whole.

    Args:
        location: A folder, or a hub id such as "Qwen/Qwen2-VL-2B-Instruct".

    Raises:
        CheckpointError: The folder, its config or a shard is missing or broken, or its tensors
            are not those of the model its config describes; all of them are listed.
        UnknownModelError: No family has its model_type.
    """
    folder = local_folder(location)
    config, source = read_config(folder, Path(location).name)
    family = family_of(config.family)
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for tensor in tensors_of(path):
            name = family.hf_key(tensor.name)
            if name in found:
                other = found[name]
                raise CheckpointError(
                    f"{folder}: {name} is there twice, as {other.name} in {other.path.name} and as "
                    f"{tensor.name} in {path.name}: remove the file that is not of this model"
                )
            found[name] = tensor
    _check_tensors(folder, config, found)
    files = {name: (tensor.path, tensor.name) for name, tensor in found.items()}
    return Checkpoint(folder, config, source, files)


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    params: Encoder,
    source: HubConfigs,
    *,
    max_shard_bytes: int = 4 * 2**30,
    backbone: bool = False,
) -> None:
    """Write the configs and the weights, named and shaped as transformers writes them.

    Args:
        folder: An existing folder.
        config: Configuration of the model.
        params: The model, without LoRA leaves (see `lora.merge`).
        source: The configs that the base model came with, whose other fields are kept.
        max_shard_bytes: A file is closed before it grows past this; several files get an index.
        backbone: Whether to name tensors as in the class without a language-model head.

    Raises:
        CheckpointError: The model has adapters that are not merged.
    """
    family = family_of(config.family)
    leaves = named_leaves(params)
    if adapters := [name for name in leaves if name not in family.weights]:
        raise CheckpointError(f"{adapters[0]} has no name on disk: merge adapters (lora.merge)")
    dtype = np.dtype(leaves["decoder.embedding.table"].dtype).name
    described = family.write_config(config, source.model) | {"dtype": dtype}
    if backbone:
        described["architectures"] = [family.backbone_architecture]
    write_json(folder / "config.json", described)
    if config.vision.layers:
        preprocessor = family.write_preprocessor(config, source.preprocessor)
        write_json(folder / "preprocessor_config.json", preprocessor)

    shards: list[list[tuple[str, str, int | None]]] = [[]]
    room, total = max_shard_bytes, 0
    for name, leaf in leaves.items():
        tensors = tensor_names(config, name, range(config.decoder.layers))
        size = leaf.nbytes // len(tensors)
        for number, tensor in enumerate(tensors):
            if size > room and shards[-1]:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append((tensor, name, number if stacked(name) else None))
            room, total = room - size, total + size

    shapes = family.disk_shapes(config)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors_of_shard = {}
        for tensor, name, layer in shard:
            values = np.asarray(leaves[name] if layer is None else leaves[name][layer])
            values = np.ascontiguousarray(values.T if _is_kernel(name) else values)
            stored = family.backbone_key(tensor) if backbone else tensor
            tensors_of_shard[stored] = values.reshape(shapes.get(tensor, values.shape))
            weight_map[stored] = file
        save_tensors(tensors_of_shard, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def stacked(name: str) -> bool:
    """Return whether a leaf has a leading axis of layers, or of what else is many and alike."""
    return name.startswith(("decoder.layers.", "vision.blocks.", "vision.deepstack."))


def _is_kernel(name: str) -> bool:
    """Return whether a leaf is [inputs, outputs] in memory and [outputs, inputs...] on disk."""
    return name.endswith(".kernel")


def _copy(values: Any, index: tuple[slice, ...], slot: ndarray, *, transposed: bool) -> None:
    """Copy `values[index]` into `slot`, `index` being that of the transpose if `transposed`.

    Copying block by block keeps a tensor from being in memory twice, and a block that is transposed
    in the cache. Inputs of more than one axis (a convolution's) are flattened.

    Raises:
        OverflowError: A value is not finite once it has the dtype of `slot`.
    """
    shape = values.get_shape()
    rows = range(*index[-1 if transposed else 0].indices(shape[0]))
    for start in range(0, len(rows), _BLOCK_ROWS):
        here = slice(start, min(start + _BLOCK_ROWS, len(rows)))
        there = slice(rows[here.start], rows[here.stop - 1] + 1)
        if not transposed:
            slot[here] = cast(values[(there, *index[1:])], slot.dtype)
        elif len(shape) == 2:
            slot[:, here] = cast(values[there, index[0]], slot.dtype).T
        else:
            block = values[there]
            slot[:, here] = cast(block.reshape(len(block), -1)[:, index[0]], slot.dtype).T


def cast(block: ndarray, dtype: np.dtype) -> ndarray:
    """Return values in another dtype.

    Raises:
        OverflowError: A value is not finite once it has the dtype.
    """
    with np.errstate(over="ignore"):
        cast = block.astype(dtype, copy=False)
    if not _all_finite(cast):
        if _all_finite(block):
            raise OverflowError(f"has values too large for {dtype.name}: read it as float32")
        raise OverflowError("has values that are not finite")
    return cast


def _all_finite(values: ndarray) -> bool:
    """Return whether no value is NaN or infinite."""
    if values.dtype != jnp.bfloat16:
        return bool(np.isfinite(values).all())
    # NumPy's own function takes ten times as long: an exponent of ones is all that has to be found.
    exponents = np.ascontiguousarray(values).view(np.uint16) & np.uint16(0x7F80)
    return int(exponents.max(initial=0)) < 0x7F80


def tensor_names(config: ModelConfig, name: str, decoder_layers: Sequence[int]) -> list[str]:
    """Return the keys of the tensors that make up a leaf, one for each layer if it is stacked."""
    pattern = family_of(config.family).weights[name]
    if not stacked(name):
        return [pattern]
    layers = decoder_layers
    if name.startswith("vision.blocks."):
        layers = range(config.vision.layers)
    elif name.startswith("vision.deepstack."):
        layers = range(len(config.vision.deepstack_blocks))
    return [pattern.format(layer) for layer in layers]


@functools.lru_cache(maxsize=8)
def tensor_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape on disk of every tensor of a model, by its Hugging Face key."""
    on_disk = family_of(config.family).disk_shapes(config)
    expected = {}
    for name, leaf in named_leaves(abstract(config)).items():
        shape = leaf.shape[1:] if stacked(name) else leaf.shape
        for tensor in tensor_names(config, name, range(config.decoder.layers)):
            expected[tensor] = on_disk.get(tensor, shape[::-1] if _is_kernel(name) else shape)
    return expected


def _check_tensors(folder: Path, config: ModelConfig, found: dict[str, Tensor]) -> None:
    expected = tensor_shapes(config)
    ignored = family_of(config.family).ignored
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [
        f"{shown(name)[1:-1]} has no place in this model"
        for name in found
        if name not in expected and name not in ignored
    ]
    wrong += [
        line
        for name, shape in expected.items()
        if name in found
        for line in mismatches(found[name], name, shape)
    ]
    refuse(folder, wrong)


def mismatches(tensor: Tensor, name: str, shape: tuple[int, ...]) -> list[str]:
    """Return what is wrong with a tensor that is to be of this shape, by this name."""
    wrong = []
    if tensor.shape != shape:
        wrong.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in _DTYPES:
        wrong.append(f"{name} is of dtype {tensor.dtype}, expected one of {', '.join(_DTYPES)}")
    return wrong


def refuse(folder: Path, wrong: Sequence[str]) -> None:
    """Raise one error that lists what is wrong with the tensors of a folder, if anything is.

    Raises:
        CheckpointError: The list is not empty.
    """
    if wrong:
        listed = "; ".join(wrong[:_MOST_LISTED])
        more = f"; and {len(wrong) - _MOST_LISTED} more" if len(wrong) > _MOST_LISTED else ""
        raise CheckpointError(f"{folder}: {len(wrong)} wrong tensors: {listed}{more}")
