"""The family Qwen3-VL, dense: its tower, Hugging Face config, weight names, published sizes.

The tower adds learned positions to the patches, a square table that is interpolated to the grid of
each image. Features of some of its blocks go past the merger to the decoder's first layers
(DeepStack, arXiv 2406.04334).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from puma_jax.config import (
    ComputeConfig,
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    PromptConfig,
    VisionConfig,
    Width,
    require,
)
from puma_jax.model.attention import constrain_batch_sharding
from puma_jax.model.families import Family, PublishedEmbedder
from puma_jax.model.hub_config import (
    decoder_fields,
    decoder_weights,
    or_default,
    patch_convolution,
    read_decoder,
    read_fields,
    renamed,
    tower_weights,
    write_preprocessor,
    written,
)
from puma_jax.model.hub_schemas import TowerFields
from puma_jax.model.layers import Embedding
from puma_jax.model.remat import rematerialize
from puma_jax.model.rope import axial_angles
from puma_jax.model.vision import PatchEmbedding, PatchMerger, VisionBlock
from puma_jax.schema import CountOrZero, Range
from puma_jax.typing import Array, Float, Int, UInt8

_HALF = (0.5, 0.5, 0.5)


class DeepStackBlock(VisionBlock):
    """The block of Qwen2-VL with the tanh approximation of GELU."""

    activation = staticmethod(functools.partial(jax.nn.gelu, approximate=True))


class DeepStackTower(nnx.Module):
    """Patch embedding with learned positions, stacked blocks under one scan, and mergers."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.patch_embedding = PatchEmbedding(config, rngs, bias=True)
        self.positions = Embedding(config.position_table_side**2, config.width, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: DeepStackBlock(config, nnx.Rngs(key)))(keys)
        self.merger = PatchMerger(config, rngs)
        keys = jax.random.split(rngs.params(), len(config.deepstack_blocks))
        self.deepstack = jax.vmap(lambda key: PatchMerger(config, nnx.Rngs(key), norm_joined=True))(
            keys
        )
        self.head_dim = config.head_dim
        self.rope_base = config.rope_base
        self.deepstack_blocks = config.deepstack_blocks

    def __call__(
        self,
        patches: UInt8[Array, "rows length values"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length 2"],
        compute: ComputeConfig,
    ) -> list[Float[Array, "rows tokens out_width"]]:
        """Return the visual tokens, as `vision.VisionTower` does, then the features of DeepStack.

        There is one array of features for each of `deepstack_blocks`.
        """
        angles = axial_angles(positions, self.head_dim, self.rope_base)
        table = self.positions.table[...]
        learned = interpolated(table, positions, grid_sizes(segment_ids, positions))
        x = self.patch_embedding(patches, compute.dtype) + learned.astype(compute.dtype)

        def block(x, layer: DeepStackBlock):
            x = constrain_batch_sharding(x)
            x = layer(x, angles, segment_ids, compute.attention)
            return constrain_batch_sharding(x)

        run = rematerialize(block, compute.remat)
        count = len(self.deepstack_blocks)

        def step(carry: tuple[Array, Array], scanned: tuple[DeepStackBlock, Array]):
            x, taken = carry
            layer, slot = scanned
            x = run(x, layer)
            return (x, jax.lax.dynamic_update_index_in_dim(taken, x, slot, 0)), None

        # The states of every block are written somewhere: of those in `deepstack_blocks` each to
        # its own slot, of all others to one more. So the scan keeps no states of other blocks.
        depth = self.blocks.attention_norm.scale.shape[0]
        slots = np.full(depth, count)
        slots[list(self.deepstack_blocks)] = range(count)
        taken = jnp.zeros((count + 1, *x.shape), x.dtype)
        (x, taken), _ = jax.lax.scan(step, (x, taken), (self.blocks, jnp.array(slots)))
        features = jax.vmap(lambda merger, states: merger(states))(self.deepstack, taken[:count])
        return [self.merger(x), *features]


def grid_sizes(
    segment_ids: Int[Array, "rows length"], positions: Int[Array, "rows length 2"]
) -> Int[Array, "rows length 2"]:
    """Return how many rows and columns of patches the image of each patch has."""

    def of_row(ids: Array, positions: Array) -> Array:
        # Ids are at most the length of the row.
        last = jnp.zeros((ids.shape[0] + 1, 2), positions.dtype).at[ids].max(positions)
        return last[ids] + 1

    return jax.vmap(of_row)(segment_ids, positions)


def interpolated(
    table: Float[Array, "entries width"],
    positions: Int[Array, "rows length 2"],
    sizes: Int[Array, "rows length 2"],
) -> Float[Array, "rows length width"]:
    """Return the learned position of each patch, float32, between four entries of the table.

    The corners of the table are those of the image; see `torch.nn.functional.interpolate` with
    `mode="bilinear"` and `align_corners=True`.

    Args:
        table: Learned positions of a square, row by row.
        positions: Row and column of each patch in its image.
        sizes: Rows and columns of the image.
    """
    side = math.isqrt(table.shape[0])
    at = positions.astype(jnp.float32) * (side - 1) / jnp.maximum(sizes - 1, 1)
    low = jnp.floor(at)
    near = [low.astype(jnp.int32), jnp.minimum(low.astype(jnp.int32) + 1, side - 1)]
    weights = [1 - (at - low), at - low]
    total = jnp.zeros((), jnp.float32)
    for row, row_weight in zip(near, weights, strict=True):
        for column, column_weight in zip(near, weights, strict=True):
            entries = table[row[..., 0] * side + column[..., 1]].astype(jnp.float32)
            total += entries * (row_weight[..., 0] * column_weight[..., 1])[..., None]
    return total


_TOWER = {
    "patch_embedding.projection": "patch_embed.proj",
    "positions": "pos_embed",
    "blocks.attention_norm": "blocks.{}.norm1",
    "blocks.attention.qkv": "blocks.{}.attn.qkv",
    "blocks.attention.out": "blocks.{}.attn.proj",
    "blocks.mlp_norm": "blocks.{}.norm2",
    "blocks.up": "blocks.{}.mlp.linear_fc1",
    "blocks.down": "blocks.{}.mlp.linear_fc2",
    "merger.norm": "merger.norm",
    "merger.up": "merger.linear_fc1",
    "merger.down": "merger.linear_fc2",
    "deepstack.norm": "deepstack_merger_list.{}.norm",
    "deepstack.up": "deepstack_merger_list.{}.linear_fc1",
    "deepstack.down": "deepstack_merger_list.{}.linear_fc2",
}


@dataclass(frozen=True)
class _TowerFields(TowerFields):
    intermediate_size: Width | None = None
    out_hidden_size: Width | None = None
    num_position_embeddings: Annotated[int, Range(1, 2**20)] | None = None
    deepstack_visual_indexes: tuple[CountOrZero, ...] | None = None
    hidden_act: Literal["gelu_pytorch_tanh"] | None = None


def read_config(hf: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelConfig:
    """Return the config that a config.json and the settings of an image processor describe.

    Raises:
        ConfigError: A field is missing, out of range, or asks for something that is not supported.
    """
    fields = read_fields(hf, preprocessor)
    decoder = read_decoder(
        fields.text,
        mrope=True,
        norm_eps=1e-6,
        rope_base=5e5,
        head_dim=128,
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
    )
    tower = fields.tower(_TowerFields)
    entries = or_default(tower.num_position_embeddings, 2304)
    require(
        math.isqrt(entries) ** 2 == entries,
        f"vision_config.num_position_embeddings {entries} is not the size of a square",
    )
    blocks = or_default(tower.deepstack_visual_indexes, (8, 16, 24))
    require(
        bool(blocks) and all(low < high for low, high in itertools.pairwise(blocks)),
        f"vision_config.deepstack_visual_indexes {list(blocks)} must be blocks in ascending order",
    )
    vision = VisionConfig(
        layers=or_default(tower.depth, 27),
        width=or_default(tower.hidden_size, 1152),
        heads=or_default(tower.num_heads, 16),
        mlp_width=or_default(tower.intermediate_size, 4304),
        out_width=or_default(tower.out_hidden_size, 3584),
        patch_size=or_default(tower.patch_size, 16),
        temporal_patch_size=or_default(tower.temporal_patch_size, 2),
        merge_size=or_default(tower.spatial_merge_size, 2),
        image_mean=or_default(fields.processor.image_mean, _HALF),
        image_std=or_default(fields.processor.image_std, _HALF),
        position_table_side=math.isqrt(entries),
        deepstack_blocks=blocks,
        timestamps=True,
    )
    # 300 visual tokens at most, as PUMA has them for smaller patches.
    return fields.model_config("qwen3_vl", vision, decoder, _limits(vision, 300))


def _limits(vision: VisionConfig, most: int) -> ImageConfig:
    """Return limits of 4 to so many visual tokens."""
    pixels = (vision.patch_size * vision.merge_size) ** 2
    return ImageConfig(4 * pixels, most * pixels)


def _as_embedder(config: ModelConfig) -> ModelConfig:
    """Return the config of Qwen3-VL-Embedding: prompt, pooling and limits of its published code.

    Its limit of 8,192 tokens holds for text and image together, ours for the text.
    """
    prompt = PromptConfig(template="instruct", pooling="last", max_text_tokens=8192)
    return dataclasses.replace(config, prompt=prompt, images=_limits(config.vision, 1800))


def write_config(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of `config`, in the form transformers 5 writes."""
    vision = config.vision
    return written(
        config,
        source,
        model_type="qwen3_vl",
        architecture="Qwen3VLForConditionalGeneration",
        text=decoder_fields(config.decoder, mrope=True) | {"head_dim": config.decoder.head_dim},
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
            "num_position_embeddings": vision.position_table_side**2,
            "deepstack_visual_indexes": list(vision.deepstack_blocks),
        },
    )


def _published(
    tower: tuple[int, int, int, tuple[int, ...]],
    width: int,
    layers: int,
    heads: int,
    mlp_width: int,
) -> ModelConfig:
    """Return a published model; `tower` has its layers, width, MLP width and DeepStack blocks."""
    vision = VisionConfig(
        layers=tower[0],
        width=tower[1],
        heads=16,
        mlp_width=tower[2],
        out_width=width,
        patch_size=16,
        image_mean=_HALF,
        image_std=_HALF,
        position_table_side=48,
        deepstack_blocks=tower[3],
        timestamps=True,
    )
    return ModelConfig(
        family="qwen3_vl",
        vision=vision,
        decoder=DecoderConfig(
            vocab_size=151936,
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=8,
            head_dim=128,
            mlp_width=mlp_width,
            rope_base=5e6,
            mrope_section=(24, 20, 20),
            mrope_interleaved=True,
            qkv_bias=False,
            qk_norm=True,
        ),
        image_token_id=151655,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        images=_limits(vision, 300),
    )


_SMALL = 24, 1024, 4096, (5, 11, 17)
_LARGE = 27, 1152, 4304, (8, 16, 24)
PUBLISHED = {
    "Qwen/Qwen3-VL-2B-Instruct": _published(_SMALL, 2048, 28, 16, 6144),
    "Qwen/Qwen3-VL-4B-Instruct": _published(_SMALL, 2560, 36, 32, 9728),
    "Qwen/Qwen3-VL-8B-Instruct": _published(_LARGE, 4096, 36, 32, 12288),
}
"""Hub id → config of the published model, for work that needs shapes and no weights."""

_PREFIX = "model.visual."
FAMILY = Family(
    tower=DeepStackTower,
    read_config=read_config,
    write_config=write_config,
    write_preprocessor=write_preprocessor,
    # Names as transformers writes them for Qwen3VLForConditionalGeneration.
    weights=decoder_weights("model.language_model.") | tower_weights(_PREFIX, _TOWER),
    disk_shapes=patch_convolution(f"{_PREFIX}patch_embed.proj.weight"),
    # A saved Qwen3VLModel names them without "model.".
    hf_key=renamed({"language_model.": "model.language_model.", "visual.": _PREFIX}),
    backbone_key=renamed({"model.": ""}),
    backbone_architecture="Qwen3VLModel",
    ignored=("lm_head.weight",),
    published=PUBLISHED,
    embedder=PublishedEmbedder("Qwen3-VL-Embedding", _as_embedder),
)
