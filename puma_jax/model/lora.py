"""Low-rank adapters (arXiv 2106.09685): add them, merge them, recognize their leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from puma_jax.config import LoraConfig
from puma_jax.model.encoder import Encoder
from puma_jax.model.layers import Linear
from puma_jax.typing import PRNGKeyArray


def add_lora(params: Encoder, config: LoraConfig, key: PRNGKeyArray) -> Encoder:
    """Return the model with fresh adapters on the decoder's linears that `config` targets.

    A is drawn as the weights of a linear are and B is zero, so that the model computes what it did
    before. Both are float32, whatever the dtype of the base weights.
    """
    params = copy(params)
    linears = dict(_decoder_linears(params))
    # Keys follow the linears, not the order in which the targets are written.
    for (name, linear), key_a in zip(
        linears.items(), jax.random.split(key, len(linears)), strict=True
    ):
        if name not in config.targets:
            continue
        layers, inputs, outputs = linear.kernel.shape
        draw = jax.nn.initializers.lecun_normal(batch_axis=0)
        linear.lora_a = nnx.LoRAParam(draw(key_a, (layers, inputs, config.rank)))
        linear.lora_b = nnx.LoRAParam(jnp.zeros((layers, config.rank, outputs)))
        linear.lora_scale = config.alpha / config.rank
        linear.lora_dropout = config.dropout
    return params


def merge(params: Encoder) -> Encoder:
    """Return the model with every adapter added into its kernel, W + s·AB, and no adapters left.

    The sum is taken in float32 and rounded once, to the dtype of W.
    """
    params = copy(params)
    for _, linear in linears(params):
        if linear.lora_a is None or linear.lora_b is None:
            continue
        kernel = linear.kernel[...]
        with jax.default_matmul_precision("highest"):
            delta = linear.lora_scale * (linear.lora_a[...] @ linear.lora_b[...])
        linear.kernel = nnx.Param((kernel.astype(jnp.float32) + delta).astype(kernel.dtype))
        linear.lora_a = linear.lora_b = None
        linear.lora_scale = linear.lora_dropout = 0.0
    return params


def is_lora(name: str) -> bool:
    """Return whether a leaf belongs to an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def copy(params: Encoder) -> Encoder:
    """Return new modules around the same arrays, so that the caller's modules stay as they are."""
    return jax.tree.map(lambda leaf: leaf, params)


def linears(module: nnx.Module, at: str = "") -> Iterator[tuple[str, Linear]]:
    """Yield every linear of a model with its path, such as "decoder.layers.mlp.up"."""
    for name, value in vars(module).items():
        path = f"{at}.{name}" if at else name
        if isinstance(value, Linear):
            yield path, value
        elif isinstance(value, nnx.Module):
            yield from linears(value, path)


def _decoder_linears(params: Encoder) -> Iterator[tuple[str, Linear]]:
    layers: Any = params.decoder.layers
    for part in (layers.attention, layers.mlp):
        for name, value in vars(part).items():
            if isinstance(value, Linear):
                yield name, value
