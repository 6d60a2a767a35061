"""The family Qwen2-VL: its Hugging Face config, its weight names, and its published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from puma_jax.config import (
    CLIP_MEAN,
    CLIP_STD,
    DecoderConfig,
    ModelConfig,
    VisionConfig,
    Width,
    require,
)
from puma_jax.model.families import Family
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
from puma_jax.model.vision import VisionTower

_TOWER = {
    "patch_embedding.projection": "patch_embed.proj",
    "blocks.attention_norm": "blocks.{}.norm1",
    "blocks.attention.qkv": "blocks.{}.attn.qkv",
    "blocks.attention.out": "blocks.{}.attn.proj",
    "blocks.mlp_norm": "blocks.{}.norm2",
    "blocks.up": "blocks.{}.mlp.fc1",
    "blocks.down": "blocks.{}.mlp.fc2",
    "merger.norm": "merger.ln_q",
    "merger.up": "merger.mlp.0",
    "merger.down": "merger.mlp.2",
}

# Names as transformers 5 writes them for Qwen2VLForConditionalGeneration.
WEIGHTS = decoder_weights("model.") | tower_weights("visual.", _TOWER)

hf_key = renamed(
    {
        # transformers 4.52 and later, and a saved Qwen2VLModel
        "model.language_model.": "model.",
        "model.visual.": "visual.",
        "language_model.": "model.",
    }
)
backbone_key = renamed({"model.": "language_model."})
"""Key in Qwen2VLModel, which every transformers 5 finds.

Some releases (5.10) find only half of the keys in `WEIGHTS` and leave the other weights random.
"""


@dataclass(frozen=True)
class _TowerFields(TowerFields):
    embed_dim: Width | None = None
    mlp_ratio: Width | None = None
    hidden_act: Literal["quick_gelu"] | None = None


def read_config(hf: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelConfig:
    """Return the config that a config.json and the settings of an image processor describe.

    Raises:
        ConfigError: A field is missing, out of range, or asks for something that is not supported.
    """
    fields = read_fields(hf, preprocessor)
    decoder = read_decoder(fields.text, mrope=True, norm_eps=1e-5, rope_base=1e6)
    tower = fields.tower(_TowerFields)
    width = or_default(tower.embed_dim, 1280)
    vision = VisionConfig(
        layers=or_default(tower.depth, 32),
        width=width,
        heads=or_default(tower.num_heads, 16),
        mlp_width=width * or_default(tower.mlp_ratio, 4),
        out_width=or_default(tower.hidden_size, decoder.width),
        patch_size=or_default(tower.patch_size, 14),
        temporal_patch_size=or_default(tower.temporal_patch_size, 2),
        merge_size=or_default(tower.spatial_merge_size, 2),
        image_mean=or_default(fields.processor.image_mean, CLIP_MEAN),
        image_std=or_default(fields.processor.image_std, CLIP_STD),
    )
    return fields.model_config("qwen2_vl", vision, decoder)


def write_config(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of `config`, in the form transformers 5 writes.

    Raises:
        ConfigError: config.json has no field for a setting.
    """
    decoder, vision = config.decoder, config.vision
    require(
        vision.mlp_width % vision.width == 0,
        f"vision.mlp_width {vision.mlp_width} is not a multiple of vision.width {vision.width}: "
        "config.json of qwen2_vl names their ratio",
    )
    return written(
        config,
        source,
        model_type="qwen2_vl",
        architecture="Qwen2VLForConditionalGeneration",
        text=decoder_fields(decoder, mrope=True) | {"max_window_layers": decoder.layers},
        tower={
            "depth": vision.layers,
            "embed_dim": vision.width,
            "num_heads": vision.heads,
            "mlp_ratio": vision.mlp_width // vision.width,
            "hidden_size": vision.out_width,
            "in_channels": vision.channels,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
        },
    )


def _published(width: int, kv_heads: int, mlp_width: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        family="qwen2_vl",
        vision=VisionConfig(layers=32, width=1280, heads=16, mlp_width=5120, out_width=width),
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            width=width,
            layers=28,
            heads=width // 128,
            kv_heads=kv_heads,
            head_dim=128,
            mlp_width=mlp_width,
        ),
        image_token_id=151655,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": _published(1536, 2, 8960, 151936),
    "Qwen/Qwen2-VL-7B-Instruct": _published(3584, 4, 18944, 152064),
}
"""Hub id → config of the published model, for work that needs shapes and no weights."""

FAMILY = Family(
    tower=VisionTower,
    read_config=read_config,
    write_config=write_config,
    write_preprocessor=write_preprocessor,
    weights=WEIGHTS,
    disk_shapes=patch_convolution("visual.patch_embed.proj.weight"),
    hf_key=hf_key,
    backbone_key=backbone_key,
    backbone_architecture="Qwen2VLModel",
    ignored=("lm_head.weight",),
    published=PUBLISHED,
)
