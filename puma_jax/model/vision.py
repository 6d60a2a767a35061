"""Vision towers: packed rows of patches in, visual tokens of the decoder's width out.

Here are the parts that families share and the tower of Qwen2-VL, which is made of nothing else.

Patches arrive as the uint8 values of a still image. Scaling to [0, 1], normalizing and repeating
the frame, which the reference does on the host, happen here: an eighth of the bytes travel to the
device.
"""

from __future__ import annotations

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from puma_jax.config import ComputeConfig, DType, PoolMode, VisionConfig
from puma_jax.model.attention import attention, constrain_batch_sharding
from puma_jax.model.layers import LayerNorm, Linear, RMSNorm, quick_gelu
from puma_jax.model.remat import rematerialize
from puma_jax.model.rope import axial_angles, rotate
from puma_jax.typing import Array, Float, Int, UInt8


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its size, which is one matrix product.

    The kernel keeps the published shape, `temporal_patch_size` frames wide. A still image fills
    every frame with the same values, so the frames' weights are summed and applied once. Patches of
    a video have all their frames, channel by channel.
    """

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, *, bias: bool = False):
        values = config.patch_values * config.temporal_patch_size
        self.projection = Linear(values, config.width, bias=bias, rngs=rngs)
        self.frames = config.temporal_patch_size
        self.mean = tuple(config.image_mean)
        self.std = tuple(config.image_std)

    def __call__(
        self, patches: UInt8[Array, "rows length values"], dtype: DType
    ) -> Float[Array, "rows length width"]:
        """Return one vector for each patch of a still image, or of as many frames as it has."""
        kernel = self.projection.kernel[...].astype(jnp.float32)
        if patches.shape[-1] < kernel.shape[0]:
            kernel = einops.reduce(
                kernel,
                "(channel frame pixel) width -> (channel pixel) width",
                "sum",
                channel=len(self.mean),
                frame=self.frames,
            )
        x = normalize(patches, self.mean, self.std).astype(dtype) @ kernel.astype(dtype)
        bias = self.projection.bias
        return x if bias is None else x + bias[...].astype(dtype)


def normalize(
    patches: UInt8[Array, "rows length values"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "rows length values"]:
    """Return normalized float32 pixels, as the published image processor computes them."""
    rows, length, values = patches.shape
    center, spread = (np.asarray(values, np.float32)[:, None] for values in (mean, std))
    scaled = patches.reshape(rows, length, len(mean), -1).astype(jnp.float32) / 255
    return ((scaled - center) / spread).reshape(rows, length, values)


class VisionAttention(nnx.Module):
    """Full attention among the patches of one segment: an image, or a window of it."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.qkv = Linear(config.width, 3 * config.width, bias=True, rngs=rngs)
        self.out = Linear(config.width, config.width, bias=True, rngs=rngs)
        self.heads = config.heads

    def __call__(
        self,
        x: Float[Array, "rows length width"],
        angles: Float[Array, "rows length half"],
        segment_ids: Int[Array, "rows length"],
        implementation: str,
    ) -> Float[Array, "rows length width"]:
        """Return the attention output of each patch over its segment."""
        rows, length, width = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(rows, length, 3, self.heads, -1), 2, 0)
        q, k = rotate(q, angles), rotate(k, angles)
        mixed = attention(
            q, k, v, segment_ids=segment_ids, causal=False, implementation=implementation
        )
        return self.out(mixed.reshape(rows, length, width))


class VisionBlock(nnx.Module):
    """Attention and a two-layer MLP, each behind a LayerNorm and around a residual."""

    activation: Callable[[Array], Array] = staticmethod(quick_gelu)

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = VisionAttention(config, rngs)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.up = Linear(config.width, config.mlp_width, bias=True, rngs=rngs)
        self.down = Linear(config.mlp_width, config.width, bias=True, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "rows length width"],
        angles: Float[Array, "rows length half"],
        segment_ids: Int[Array, "rows length"],
        implementation: str,
    ) -> Float[Array, "rows length width"]:
        """Return the states after this block."""
        x = x + self.attention(self.attention_norm(x), angles, segment_ids, implementation)
        return x + self.down(self.activation(self.up(self.mlp_norm(x))))


class PatchMerger(nnx.Module):
    """Join each block of neighboring patches and project it to the decoder's width."""

    def __init__(
        self,
        config: VisionConfig,
        rngs: nnx.Rngs,
        *,
        norm: Callable[[int, float], RMSNorm | LayerNorm] = LayerNorm,
        norm_joined: bool = False,
    ):
        """Make a merger with new weights.

        Args:
            config: The tower.
            rngs: Where weights are drawn from.
            norm: Kind of the norm before the first projection.
            norm_joined: Whether the norm is of joined patches, and not of each patch.
        """
        joined = config.width * config.merged
        self.norm = norm(joined if norm_joined else config.width, config.norm_eps)
        self.up = Linear(joined, joined, bias=True, rngs=rngs)
        self.down = Linear(joined, config.out_width, bias=True, rngs=rngs)
        self.norm_joined = norm_joined

    def __call__(
        self, x: Float[Array, "rows length width"]
    ) -> Float[Array, "rows tokens out_width"]:
        """Return one token for every `merge_size`² patches."""

        def join(patches: Array) -> Array:
            return patches.reshape(x.shape[0], -1, self.up.kernel.shape[0])

        joined = self.norm(join(x)) if self.norm_joined else join(self.norm(x))
        return self.down(jax.nn.gelu(self.up(joined), approximate=False))


def pool_tokens(
    tokens: Float[Array, "rows tokens width"], stride: int, mode: PoolMode
) -> Float[Array, "rows pooled width"]:
    """Return visual tokens of which each square of `stride`² has become one.

    The tokens of a square lie side by side, see `positions.patch_positions`. With "random", the
    host has put the one to keep in front, see `items.drawn_first`.
    """
    if stride == 1:
        return tokens
    squares = tokens.reshape(tokens.shape[0], -1, stride**2, tokens.shape[-1])
    return squares[:, :, 0] if mode == "random" else squares.mean(2)


class VisionTower(nnx.Module):
    """Patch embedding, stacked blocks under one scan, merger."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.patch_embedding = PatchEmbedding(config, rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: VisionBlock(config, nnx.Rngs(key)))(keys)
        self.merger = PatchMerger(config, rngs)
        self.head_dim = config.head_dim
        self.rope_base = config.rope_base

    def __call__(
        self,
        patches: UInt8[Array, "rows length values"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length 2"],
        compute: ComputeConfig,
    ) -> list[Float[Array, "rows tokens out_width"]]:
        """Return the visual tokens, alone in a list: this tower has no features for later layers.

        Token i of a row is merged from its patches 4i to 4i + 3.

        Args:
            patches: uint8 pixel values, channel by channel, in the order of `patch_positions`.
            segment_ids: Number of the image of each patch; 0 is padding.
            positions: Row and column of each patch in its image.
            compute: How to run.
        """
        angles = axial_angles(positions, self.head_dim, self.rope_base)

        def block(x, layer: VisionBlock):
            return constrain_batch_sharding(
                layer(constrain_batch_sharding(x), angles, segment_ids, compute.attention)
            ), None

        x = self.patch_embedding(patches, compute.dtype)
        x, _ = jax.lax.scan(rematerialize(block, compute.remat), x, self.blocks)
        return [self.merger(x)]
