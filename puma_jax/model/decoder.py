"""The decoder: stacked layers of grouped-query attention and SwiGLU under one scan.

Its options (`DecoderConfig`) make it that of Qwen2, Qwen2-VL, Qwen3, Qwen3-VL and Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from puma_jax.config import ComputeConfig, DecoderConfig
from puma_jax.model.attention import attention, constrain_batch_sharding
from puma_jax.model.dropout import TokenKeys, fold_in
from puma_jax.model.layers import Embedding, Linear, RMSNorm
from puma_jax.model.remat import rematerialize
from puma_jax.model.rope import mrope_angles, rotate
from puma_jax.typing import Array, Float, Int

# Linears of a layer. The position of a name is folded into its dropout keys: never reorder them.
PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")

ProjectionKeys = Mapping[str, TokenKeys | None]
"""Dropout keys by the name of a projection; None drops nothing."""


class DecoderAttention(nnx.Module):
    """Grouped-query attention, causal or not; the output projection has no bias."""

    query_norm: RMSNorm | None
    key_norm: RMSNorm | None

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = Linear(config.width, inner, bias=config.qkv_bias, rngs=rngs)
        self.key = Linear(config.width, kv, bias=config.qkv_bias, rngs=rngs)
        self.value = Linear(config.width, kv, bias=config.qkv_bias, rngs=rngs)
        self.out = Linear(inner, config.width, bias=False, rngs=rngs)
        self.query_norm, self.key_norm = (
            nnx.data(RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None)
            for _ in range(2)
        )
        self.head_dim = config.head_dim
        self.causal = config.causal

    def __call__(
        self,
        x: Float[Array, "rows length width"],
        angles: Float[Array, "rows length half"],
        segment_ids: Int[Array, "rows length"],
        implementation: str,
        keys: ProjectionKeys,
    ) -> Float[Array, "rows length width"]:
        """Return the attention output of each token over its item, or the part before it."""
        rows, length, _ = x.shape
        heads = (rows, length, -1, self.head_dim)
        q = self.query(x, keys["query"]).reshape(heads)
        k = self.key(x, keys["key"]).reshape(heads)
        v = self.value(x, keys["value"]).reshape(heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        mixed = attention(
            q, k, v, segment_ids=segment_ids, causal=self.causal, implementation=implementation
        )
        return self.out(mixed.reshape(rows, length, -1), keys["out"])


class DecoderMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.gate = Linear(config.width, config.mlp_width, bias=False, rngs=rngs)
        self.up = Linear(config.width, config.mlp_width, bias=False, rngs=rngs)
        self.down = Linear(config.mlp_width, config.width, bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "rows length width"], keys: ProjectionKeys
    ) -> Float[Array, "rows length width"]:
        """Return the MLP of every token."""
        gated = jax.nn.silu(self.gate(x, keys["gate"])) * self.up(x, keys["up"])
        return self.down(gated, keys["down"])


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind an RMSNorm and around a residual."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = DecoderAttention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = DecoderMLP(config, rngs)

    def __call__(
        self,
        x: Float[Array, "rows length width"],
        angles: Float[Array, "rows length half"],
        segment_ids: Int[Array, "rows length"],
        implementation: str,
        dropout_keys: TokenKeys | None = None,
    ) -> Float[Array, "rows length width"]:
        """Return the states after this layer."""
        keys: ProjectionKeys = {
            name: None if dropout_keys is None else fold_in(dropout_keys, number)
            for number, name in enumerate(PROJECTIONS)
        }
        normed = self.attention_norm(x)
        x = x + self.attention(normed, angles, segment_ids, implementation, keys)
        return x + self.mlp(self.mlp_norm(x), keys)


@dataclass(frozen=True)
class Exits:
    """Depths at which states are pooled on the way to the last layer, and how."""

    layers: tuple[int, ...]
    """Numbers of layers."""
    pool: Callable[[Array], Array]
    """Returns the pooled states, `[slots, width]`, of states `[rows, length, width]`."""


class Decoder(nnx.Module):
    """Token table, stacked layers, final norm. An embedder needs no language-model head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embedding = Embedding(config.vocab_size, config.width, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = jax.vmap(lambda key: DecoderLayer(config, nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head_dim = config.head_dim
        self.rope_base = config.rope_base
        self.mrope_section = config.mrope_section
        self.mrope_interleaved = config.mrope_interleaved

    def __call__(
        self,
        x: Float[Array, "rows length width"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length 3"],
        compute: ComputeConfig,
        dropout_keys: TokenKeys | None = None,
        layers: DecoderLayer | None = None,
        features: Float[Array, "features rows length width"] | None = None,
        exits: Exits | None = None,
    ) -> tuple[Float[Array, "rows length width"], Float[Array, "exits slots width"] | None]:
        """Return the states after the last layer, and the pooled states of the exits, if any.

        Both are **before** the final norm: the caller applies it, only where it needs the states.
        The pooled states are carried from layer to layer, so they take the memory of the exits
        alone, whatever the number of layers.

        Args:
            x: Token and visual embeddings.
            segment_ids: Number of the item at each position; 0 is padding.
            positions: Time, height and width position of each token in its item, for M-RoPE.
            compute: How to run.
            dropout_keys: Keys of LoRA dropout, one for each token; None drops nothing.
            layers: A stack to run in place of this decoder's own layers.
            features: Features to add after the first layers of the stack, one after each.
            exits: Depths at which states are pooled on the way; None pools none.
        """
        layers = self.layers if layers is None else layers
        angles = mrope_angles(
            positions, self.head_dim, self.rope_base, self.mrope_section, self.mrope_interleaved
        )

        def layer(carry, scanned: tuple[DecoderLayer, Int[Array, ""]]):
            x, pooled = carry
            weights, number = scanned
            keys = None if dropout_keys is None else fold_in(dropout_keys, number)
            x = weights(constrain_batch_sharding(x), angles, segment_ids, compute.attention, keys)
            if features is not None:
                x = x + _at(features, number).astype(x.dtype)
            x = constrain_batch_sharding(x)
            if exits is not None:
                here = jnp.asarray(exits.layers) == number + 1
                pooled = jnp.where(here[:, None, None], exits.pool(x), pooled)
            return (x, pooled), None

        numbers = jnp.arange(layers.attention_norm.scale.shape[0])
        x = x.astype(jnp.dtype(compute.dtype))
        pooled = None
        if exits is not None:
            like = jax.eval_shape(exits.pool, x)
            pooled = jnp.zeros((len(exits.layers), *like.shape), like.dtype)
        body = rematerialize(layer, compute.remat)
        (x, pooled), _ = jax.lax.scan(body, (x, pooled), (layers, numbers))
        return x, pooled


def _at(features: Float[Array, "features *rest"], number: Int[Array, ""]) -> Float[Array, "*rest"]:
    """Return the features for after a layer of this number, zero for layers that have none."""
    return jnp.take(features, number, axis=0, mode="fill", fill_value=0)
