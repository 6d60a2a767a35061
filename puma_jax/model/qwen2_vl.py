"""The family Qwen2-VL: its Hugging Face config, its weight names, and its published sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from puma_jax.config import (
    CLIP_MEAN,
    CLIP_STD,
    DecoderConfig,
    ModelConfig,
    VisionConfig,
    require,
)
from puma_jax.errors import ConfigError
from puma_jax.model.families import Family
from puma_jax.model.hub_schemas import (
    DecoderFields,
    ImageProcessorFields,
    ModelFields,
    RopeFields,
    SavedFields,
    TowerFields,
)
from puma_jax.model.vision import VisionTower
from puma_jax.schema import from_json

Value = TypeVar("Value")

# Key in a saved config.json for what transformers has no field for.
CONFIG_KEY = "puma_jax"

_BLOCK = "visual.blocks.{}."
_LAYER = "model.layers.{}."

# Names as transformers 5 writes them for Qwen2VLForConditionalGeneration.
WEIGHTS = {
    "vision.patch_embedding.projection.kernel": "visual.patch_embed.proj.weight",
    "vision.blocks.attention_norm.scale": _BLOCK + "norm1.weight",
    "vision.blocks.attention_norm.bias": _BLOCK + "norm1.bias",
    "vision.blocks.attention.qkv.kernel": _BLOCK + "attn.qkv.weight",
    "vision.blocks.attention.qkv.bias": _BLOCK + "attn.qkv.bias",
    "vision.blocks.attention.out.kernel": _BLOCK + "attn.proj.weight",
    "vision.blocks.attention.out.bias": _BLOCK + "attn.proj.bias",
    "vision.blocks.mlp_norm.scale": _BLOCK + "norm2.weight",
    "vision.blocks.mlp_norm.bias": _BLOCK + "norm2.bias",
    "vision.blocks.up.kernel": _BLOCK + "mlp.fc1.weight",
    "vision.blocks.up.bias": _BLOCK + "mlp.fc1.bias",
    "vision.blocks.down.kernel": _BLOCK + "mlp.fc2.weight",
    "vision.blocks.down.bias": _BLOCK + "mlp.fc2.bias",
    "vision.merger.norm.scale": "visual.merger.ln_q.weight",
    "vision.merger.norm.bias": "visual.merger.ln_q.bias",
    "vision.merger.up.kernel": "visual.merger.mlp.0.weight",
    "vision.merger.up.bias": "visual.merger.mlp.0.bias",
    "vision.merger.down.kernel": "visual.merger.mlp.2.weight",
    "vision.merger.down.bias": "visual.merger.mlp.2.bias",
    "decoder.embedding.table": "model.embed_tokens.weight",
    "decoder.layers.attention_norm.scale": _LAYER + "input_layernorm.weight",
    "decoder.layers.attention.query.kernel": _LAYER + "self_attn.q_proj.weight",
    "decoder.layers.attention.query.bias": _LAYER + "self_attn.q_proj.bias",
    "decoder.layers.attention.key.kernel": _LAYER + "self_attn.k_proj.weight",
    "decoder.layers.attention.key.bias": _LAYER + "self_attn.k_proj.bias",
    "decoder.layers.attention.value.kernel": _LAYER + "self_attn.v_proj.weight",
    "decoder.layers.attention.value.bias": _LAYER + "self_attn.v_proj.bias",
    "decoder.layers.attention.out.kernel": _LAYER + "self_attn.o_proj.weight",
    "decoder.layers.mlp_norm.scale": _LAYER + "post_attention_layernorm.weight",
    "decoder.layers.mlp.gate.kernel": _LAYER + "mlp.gate_proj.weight",
    "decoder.layers.mlp.up.kernel": _LAYER + "mlp.up_proj.weight",
    "decoder.layers.mlp.down.kernel": _LAYER + "mlp.down_proj.weight",
    "decoder.norm.scale": "model.norm.weight",
}

# Prefixes of other generations: transformers 4.52 and later, and a saved Qwen2VLModel.
_PREFIXES = {
    "model.language_model.": "model.",
    "model.visual.": "visual.",
    "language_model.": "model.",
}


def hf_key(name: str) -> str:
    """Return the Hugging Face key of `WEIGHTS` for a tensor that any generation named."""
    for prefix, today in _PREFIXES.items():
        if name.startswith(prefix):
            return today + name.removeprefix(prefix)
    return name


def backbone_key(name: str) -> str:
    """Return the key of a tensor in Qwen2VLModel, which every transformers 5 finds.

    Some releases (5.10) find only half of the keys in `WEIGHTS` and leave the other weights random.
    """
    rest = name.removeprefix("model.")
    return name if rest == name else f"language_model.{rest}"


def read_config(hf: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelConfig:
    """Return the config that a config.json and the settings of an image processor describe.

    Decoder fields stand at the top (hub files) or in `text_config` (transformers 5), the rope
    settings in `rope_parameters` or `rope_scaling` and `rope_theta`.

    Raises:
        ConfigError: A field is missing, out of range, or asks for something that is not supported.
    """
    fields = _read(ModelFields, hf, "config.json")
    text = _read(DecoderFields, {**hf, **(fields.text_config or {})}, "config.json")
    decoder = _decoder_config(text)
    processor = _read(ImageProcessorFields, preprocessor, "image processor")
    tower = fields.vision_config or TowerFields()
    saved = fields.puma_jax or SavedFields()
    return ModelConfig(
        family="qwen2_vl",
        vision=_vision_config(tower, processor, decoder),
        decoder=decoder,
        image_token_id=_or(fields.image_token_id, 151655),
        vision_start_token_id=_or(fields.vision_start_token_id, 151652),
        vision_end_token_id=_or(fields.vision_end_token_id, 151653),
        images=saved.images,
        prompt=saved.prompt,
        kept_layers=saved.kept_layers,
        widths=saved.widths,
    )


def _read(kind: type[Value], value: Mapping[str, Any], name: str) -> Value:
    try:
        return from_json(kind, value, unknown="ignore")
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _decoder_config(text: DecoderFields) -> DecoderConfig:
    rope = text.rope_parameters or text.rope_scaling or RopeFields()
    if rope.mrope_section is None:
        raise ConfigError("rope_parameters.mrope_section is missing: only M-RoPE is supported")
    require(
        text.hidden_size % text.num_attention_heads == 0,
        f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads "
        f"{text.num_attention_heads}",
    )
    return DecoderConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=_or(text.num_key_value_heads, text.num_attention_heads),
        head_dim=text.hidden_size // text.num_attention_heads,
        mlp_width=text.intermediate_size,
        norm_eps=_or(text.rms_norm_eps, 1e-5),
        rope_base=_or(rope.rope_theta, _or(text.rope_theta, 1e6)),
        mrope_section=rope.mrope_section,
    )


def _vision_config(
    tower: TowerFields, processor: ImageProcessorFields, decoder: DecoderConfig
) -> VisionConfig:
    width = _or(tower.embed_dim, 1280)
    vision = VisionConfig(
        layers=_or(tower.depth, 32),
        width=width,
        heads=_or(tower.num_heads, 16),
        mlp_width=width * _or(tower.mlp_ratio, 4),
        out_width=_or(tower.hidden_size, decoder.width),
        patch_size=_or(tower.patch_size, 14),
        temporal_patch_size=_or(tower.temporal_patch_size, 2),
        merge_size=_or(tower.spatial_merge_size, 2),
        image_mean=_or(processor.image_mean, CLIP_MEAN),
        image_std=_or(processor.image_std, CLIP_STD),
    )
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        cut = _or(getattr(processor, name), getattr(vision, name))
        require(
            cut == getattr(vision, name),
            f"image processor.{name} {cut} is not that of vision_config, {getattr(vision, name)}",
        )
    rescale = _or(processor.rescale_factor, 1 / 255)
    require(
        math.isclose(rescale, 1 / 255, rel_tol=1e-6),
        f"image processor.rescale_factor {rescale} is not supported, only 1/255",
    )
    return vision


def _or(value: Value | None, default: Value) -> Value:
    """Return a value, or the default of transformers if it is missing or null."""
    return default if value is None else value


def write_config(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of `config`, in the form transformers 5 writes.

    Fields of `source` that say nothing about shapes are kept as they are. The head is not part
    of an embedder; `tie_word_embeddings` says so to the classes that would look for one.

    Raises:
        ConfigError: config.json has no field for a setting.
    """
    decoder, vision = config.decoder, config.vision
    require(
        vision.mlp_width % vision.width == 0,
        f"vision.mlp_width {vision.mlp_width} is not a multiple of vision.width {vision.width}: "
        "config.json of qwen2_vl names their ratio",
    )
    dropped = (*_FLAT_TEXT, "torch_dtype")
    hf = {key: value for key, value in copy.deepcopy(dict(source)).items() if key not in dropped}
    text = hf.get("text_config") or {key: source[key] for key in _FLAT_TEXT if key in source}
    for outdated in ("rope_scaling", "rope_theta", "layer_types", "tie_word_embeddings"):
        text.pop(outdated, None)
    text |= {
        "model_type": "qwen2_vl_text",
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "intermediate_size": decoder.mlp_width,
        "rms_norm_eps": decoder.norm_eps,
        "max_window_layers": decoder.layers,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": decoder.rope_base,
            "mrope_section": list(decoder.mrope_section),
        },
    }
    tower = {
        **(hf.get("vision_config") or {}),
        "model_type": "qwen2_vl_vision",
        "depth": vision.layers,
        "embed_dim": vision.width,
        "num_heads": vision.heads,
        "mlp_ratio": vision.mlp_width // vision.width,
        "hidden_size": vision.out_width,
        "in_channels": vision.channels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.merge_size,
    }
    return hf | {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": text,
        "vision_config": tower,
        CONFIG_KEY: {
            "kept_layers": list(config.kept_layers),
            "images": vars(config.images).copy(),
            "prompt": vars(config.prompt).copy(),
            **({"widths": list(config.widths)} if config.widths else {}),
        },
    }


def write_preprocessor(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessor_config.json of `config`."""
    limits, vision = config.images, config.vision
    return {
        **source,
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def disk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of the patch convolution on disk: outputs, channels, frames, side, side."""
    vision = config.vision
    side = vision.patch_size
    shape = (vision.width, vision.channels, vision.temporal_patch_size, side, side)
    return {"visual.patch_embed.proj.weight": shape}


# Fields of the decoder that hub files of Qwen2-VL keep at the top level of config.json.
_FLAT_TEXT = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
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
    disk_shapes=disk_shapes,
    hf_key=hf_key,
    backbone_key=backbone_key,
    backbone_architecture="Qwen2VLModel",
    ignored=("lm_head.weight",),
)
