"""The family Qwen2.5-VL: its tower, its Hugging Face config, its weight names, published sizes.

Most blocks of the tower attend inside windows of 8 × 8 patches. A window is a segment like any
other. Its patches come to lie side by side inside the model, not when rows are packed: packed rows
are the same for all families, and so is all that prepares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from puma_jax.config import (
    CLIP_MEAN,
    CLIP_STD,
    ComputeConfig,
    DecoderConfig,
    ModelConfig,
    VisionConfig,
    Width,
    require,
)
from puma_jax.model.attention import constrain_batch_sharding
from puma_jax.model.families import Family
from puma_jax.model.hub_config import (
    decoder_fields,
    decoder_weights,
    or_default,
    patch_convolution,
    read_decoder,
    read_fields,
    tower_weights,
    write_preprocessor,
    written,
)
from puma_jax.model.hub_schemas import TowerFields
from puma_jax.model.layers import Linear, RMSNorm
from puma_jax.model.qwen2_vl import backbone_key, hf_key
from puma_jax.model.remat import rematerialize
from puma_jax.model.rope import axial_angles
from puma_jax.model.vision import PatchEmbedding, PatchMerger, VisionAttention
from puma_jax.schema import CountOrZero, NotNegative
from puma_jax.typing import Array, Float, Int, UInt8


class WindowedBlock(nnx.Module):
    """Attention and a SwiGLU MLP with biases, each behind an RMSNorm and around a residual."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = VisionAttention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.gate = Linear(config.width, config.mlp_width, bias=True, rngs=rngs)
        self.up = Linear(config.width, config.mlp_width, bias=True, rngs=rngs)
        self.down = Linear(config.mlp_width, config.width, bias=True, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "rows length width"],
        angles: Float[Array, "rows length half"],
        segment_ids: Int[Array, "rows length"],
        implementation: str,
    ) -> Float[Array, "rows length width"]:
        """Return the states after this block, whose attention stays inside the segments."""
        x = x + self.attention(self.attention_norm(x), angles, segment_ids, implementation)
        normed = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))


class WindowedTower(nnx.Module):
    """Patch embedding, stacked blocks under one scan, of windows or whole images, and merger."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.patch_embedding = PatchEmbedding(config, rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: WindowedBlock(config, nnx.Rngs(key)))(keys)
        self.merger = PatchMerger(config, rngs, norm=RMSNorm)
        self.head_dim = config.head_dim
        self.rope_base = config.rope_base
        self.window_size = config.window_size
        self.merged = config.merged
        self.full_attention = tuple(
            block in config.full_attention_blocks for block in range(config.layers)
        )

    def __call__(
        self,
        patches: UInt8[Array, "rows length values"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length 2"],
        compute: ComputeConfig,
    ) -> list[Float[Array, "rows tokens out_width"]]:
        """Return the visual tokens, as `vision.VisionTower` does."""
        order, windows = window_order(segment_ids, positions, self.window_size)
        images = jnp.take_along_axis(segment_ids, order, axis=1)
        patches, positions = (
            jnp.take_along_axis(values, order[..., None], axis=1) for values in (patches, positions)
        )
        angles = axial_angles(positions, self.head_dim, self.rope_base)

        def block(x, scanned: tuple[WindowedBlock, Array]):
            layer, full = scanned
            x = constrain_batch_sharding(x)
            x = layer(x, angles, jnp.where(full, images, windows), compute.attention)
            return constrain_batch_sharding(x), None

        x = self.patch_embedding(patches, compute.dtype)
        scanned = self.blocks, jnp.array(self.full_attention)
        x, _ = jax.lax.scan(rematerialize(block, compute.remat), x, scanned)
        # The patches of a token are still side by side: a window holds whole tokens.
        back = jnp.argsort(order[:, :: self.merged], axis=1)
        return [jnp.take_along_axis(self.merger(x), back[..., None], axis=1)]


def window_order(
    segment_ids: Int[Array, "rows length"], positions: Int[Array, "rows length 2"], size: int
) -> tuple[Int[Array, "rows length"], Int[Array, "rows length"]]:
    """Return the order in which windows are contiguous, and the window of each patch in it.

    Args:
        segment_ids: Number of the image of each patch; 0 is padding, which stays behind.
        positions: Row and column of each patch in its image.
        size: Side of a window, in patches. Windows at the right and lower edge may be smaller.
    """
    row, column = jnp.moveaxis(positions // size, -1, 0)
    image = jnp.where(segment_ids > 0, segment_ids, jnp.iinfo(segment_ids.dtype).max)
    order = jnp.lexsort((column, row, image))
    keys = [jnp.take_along_axis(key, order, axis=1) for key in (image, row, column)]
    first = sum((key[:, 1:] != key[:, :-1]).astype(jnp.int32) for key in keys) > 0
    windows = 1 + jnp.pad(jnp.cumsum(first, axis=1), ((0, 0), (1, 0)))
    padding = jnp.take_along_axis(segment_ids, order, axis=1) == 0
    return order, jnp.where(padding, 0, windows).astype(segment_ids.dtype)


_TOWER = {
    "patch_embedding.projection": "patch_embed.proj",
    "blocks.attention_norm": "blocks.{}.norm1",
    "blocks.attention.qkv": "blocks.{}.attn.qkv",
    "blocks.attention.out": "blocks.{}.attn.proj",
    "blocks.mlp_norm": "blocks.{}.norm2",
    "blocks.gate": "blocks.{}.mlp.gate_proj",
    "blocks.up": "blocks.{}.mlp.up_proj",
    "blocks.down": "blocks.{}.mlp.down_proj",
    "merger.norm": "merger.ln_q",
    "merger.up": "merger.mlp.0",
    "merger.down": "merger.mlp.2",
}


@dataclass(frozen=True)
class _TowerFields(TowerFields):
    intermediate_size: Width | None = None
    out_hidden_size: Width | None = None
    window_size: Width | None = None
    fullatt_block_indexes: tuple[CountOrZero, ...] | None = None
    hidden_act: Literal["silu"] | None = None
    tokens_per_second: NotNegative | None = None


def read_config(hf: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelConfig:
    """Return the config that a config.json and the settings of an image processor describe.

    Raises:
        ConfigError: A field is missing, out of range, or asks for something that is not supported.
    """
    fields = read_fields(hf, preprocessor)
    decoder = read_decoder(fields.text, mrope=True, norm_eps=1e-5, rope_base=1e6)
    tower = fields.tower(_TowerFields)
    layers = or_default(tower.depth, 32)
    merge, patch = or_default(tower.spatial_merge_size, 2), or_default(tower.patch_size, 14)
    pixels = or_default(tower.window_size, 112)
    require(
        pixels >= merge * patch,
        f"vision_config.window_size {pixels} is less than a visual token, {merge * patch} pixels",
    )
    full = or_default(tower.fullatt_block_indexes, (7, 15, 23, 31))
    vision = VisionConfig(
        layers=layers,
        width=or_default(tower.hidden_size, 3584),
        heads=or_default(tower.num_heads, 16),
        mlp_width=or_default(tower.intermediate_size, 3420),
        out_width=or_default(tower.out_hidden_size, 3584),
        patch_size=patch,
        temporal_patch_size=or_default(tower.temporal_patch_size, 2),
        merge_size=merge,
        image_mean=or_default(fields.processor.image_mean, CLIP_MEAN),
        image_std=or_default(fields.processor.image_std, CLIP_STD),
        window_size=pixels // merge // patch * merge,
        full_attention_blocks=tuple(sorted({block for block in full if block < layers})),
        tokens_per_second=or_default(tower.tokens_per_second, 4.0),
    )
    return fields.model_config("qwen2_5_vl", vision, decoder)


def write_config(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of `config`, in the form transformers 5 writes."""
    decoder, vision = config.decoder, config.vision
    rate = float(vision.tokens_per_second)
    return written(
        config,
        source,
        model_type="qwen2_5_vl",
        architecture="Qwen2_5_VLForConditionalGeneration",
        text=decoder_fields(decoder, mrope=True) | {"max_window_layers": decoder.layers},
        tower={
            "depth": vision.layers,
            "hidden_size": vision.width,
            "num_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
            "out_hidden_size": vision.out_width,
            "in_channels": vision.channels,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
            "window_size": vision.window_size * vision.patch_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
            # transformers reads whole numbers only.
            "tokens_per_second": int(rate) if rate.is_integer() else rate,
        },
    )


def _published(
    width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, vocab_size: int
) -> ModelConfig:
    return ModelConfig(
        family="qwen2_5_vl",
        vision=VisionConfig(
            layers=32,
            width=1280,
            heads=16,
            mlp_width=3420,
            out_width=width,
            window_size=8,
            full_attention_blocks=(7, 15, 23, 31),
            tokens_per_second=2.0,
        ),
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=128,
            mlp_width=mlp_width,
        ),
        image_token_id=151655,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _published(2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-VL-7B-Instruct": _published(3584, 28, 28, 4, 18944, 152064),
}
"""Hub id → config of the published model, for work that needs shapes and no weights."""

FAMILY = Family(
    tower=WindowedTower,
    read_config=read_config,
    write_config=write_config,
    write_preprocessor=write_preprocessor,
    weights=decoder_weights("model.") | tower_weights("visual.", _TOWER),
    disk_shapes=patch_convolution("visual.patch_embed.proj.weight"),
    hf_key=hf_key,
    backbone_key=backbone_key,
    backbone_architecture="Qwen2_5_VLModel",
    ignored=("lm_head.weight",),
    published=PUBLISHED,
)
