"""What the families' readings of config.json have in common: fields, defaults, weight names."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from puma_jax.config import DecoderConfig, ImageConfig, ModelConfig, VisionConfig, require
from puma_jax.errors import ConfigError
from puma_jax.model.families import CONFIG_KEY
from puma_jax.model.hub_schemas import (
    DecoderFields,
    ImageProcessorFields,
    ModelFields,
    RopeFields,
    SavedFields,
)
from puma_jax.schema import from_json

Value = TypeVar("Value")

# Fields of the decoder that hub files of Qwen2-VL and Qwen2.5-VL keep at the top of config.json.
_FLAT_TEXT = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "is_causal",
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
# Fields that earlier versions of transformers wrote, that number layers that may be gone, or that
# are written anew.
OUTDATED_TEXT = ("rope_scaling", "rope_theta", "layer_types", "tie_word_embeddings", "is_causal")


def decoder_weights(prefix: str) -> dict[str, str]:
    """Return the path of every leaf of a decoder → its key, below a prefix such as "model."."""
    layer = prefix + "layers.{}."
    projections = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    norms = {
        "attention_norm": "input_layernorm",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
    }
    return {
        "decoder.embedding.table": prefix + "embed_tokens.weight",
        "decoder.norm.scale": prefix + "norm.weight",
        **{
            f"decoder.layers.{ours}.kernel": f"{layer}{theirs}.weight"
            for ours, theirs in projections.items()
        },
        **{
            f"decoder.layers.{ours}.bias": f"{layer}{theirs}.bias"
            for ours, theirs in projections.items()
        },
        **{
            f"decoder.layers.{ours}.scale": f"{layer}{theirs}.weight"
            for ours, theirs in norms.items()
        },
    }


def tower_weights(prefix: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Return the path of every leaf of a tower → its key.

    Args:
        prefix: Prefix of the tower's keys, such as "visual.".
        parts: Path of a linear, norm or table in the tower → its name, "{}" for a layer's number.
    """
    names = {}
    for ours, theirs in parts.items():
        for leaf in ("kernel", "scale", "table"):
            names[f"vision.{ours}.{leaf}"] = f"{prefix}{theirs}.weight"
        names[f"vision.{ours}.bias"] = f"{prefix}{theirs}.bias"
    return names


def renamed(prefixes: Mapping[str, str]) -> Callable[[str], str]:
    """Return the function that replaces the first of these prefixes that a key begins with."""

    def rename(key: str) -> str:
        for prefix, today in prefixes.items():
            if key.startswith(prefix):
                return today + key.removeprefix(prefix)
        return key

    return rename


@dataclass(frozen=True)
class HubFields:
    """The fields of a config.json and of the settings of an image processor, checked."""

    model: ModelFields
    text: DecoderFields
    processor: ImageProcessorFields

    def tower(self, kind: type[Value]) -> Value:
        """Return `vision_config` as the fields of a family."""
        return _read(kind, self.model.vision_config or {}, "config.json", "vision_config")

    def model_config(
        self,
        family: str,
        vision: VisionConfig,
        decoder: DecoderConfig,
        images: ImageConfig | None = None,
    ) -> ModelConfig:
        """Return the config of a model of this tower and decoder.

        Args:
            family: Its name in `families.FAMILIES`.
            vision: The tower, as the image processor has to cut images for it.
            decoder: The decoder.
            images: Limits on image sizes where none are saved.

        Raises:
            ConfigError: The image processor cuts other patches, or scales pixels by another factor.
        """
        saved = self.model.puma_jax or SavedFields()
        images = saved.images or images or ImageConfig()
        _check_processor(self.processor, vision, images)
        image, start, end = (151655, 151652, 151653) if vision.layers else (0, 0, 0)
        return ModelConfig(
            family=family,
            vision=vision,
            decoder=decoder,
            image_token_id=or_default(self.model.image_token_id, image),
            vision_start_token_id=or_default(self.model.vision_start_token_id, start),
            vision_end_token_id=or_default(self.model.vision_end_token_id, end),
            images=images,
            prompt=saved.prompt,
            kept_layers=saved.kept_layers,
            widths=saved.widths,
            exit_layers=saved.exit_layers,
        )


def read_fields(hf: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> HubFields:
    """Return the fields of a config.json and of the settings of an image processor.

    Decoder fields stand at the top (hub files) or in `text_config` (transformers 5).

    Raises:
        ConfigError: A field is missing, out of range, or asks for something that is not supported.
    """
    fields = _read(ModelFields, hf, "config.json")
    return HubFields(
        fields,
        _read(DecoderFields, {**hf, **(fields.text_config or {})}, "config.json"),
        _read(ImageProcessorFields, preprocessor, "image processor"),
    )


def _read(kind: type[Value], value: Mapping[str, Any], name: str, at: str = "") -> Value:
    try:
        return from_json(kind, value, at, unknown="ignore")
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def read_decoder(
    text: DecoderFields,
    *,
    mrope: bool,
    norm_eps: float,
    rope_base: float,
    head_dim: int | None = None,
    mrope_interleaved: bool = False,
    qkv_bias: bool = True,
    qk_norm: bool = False,
) -> DecoderConfig:
    """Return the config of a decoder, whose rope settings have one of three names.

    Args:
        text: The fields of config.json.
        mrope: Whether positions have three axes; otherwise all frequencies are those of time.
        norm_eps: What transformers takes where `rms_norm_eps` is missing.
        rope_base: What transformers takes where `rope_theta` is missing.
        head_dim: What transformers takes where `head_dim` is missing; None divides the width.
        mrope_interleaved: As in `DecoderConfig`.
        qkv_bias: As in `DecoderConfig`.
        qk_norm: As in `DecoderConfig`.

    Raises:
        ConfigError: M-RoPE has no section, or the heads do not divide the width.
    """
    require(
        qkv_bias or not text.attention_bias,
        "attention_bias true is not supported: the output projection would have a bias, too",
    )
    rope = text.rope_parameters or text.rope_scaling or RopeFields()
    if mrope and rope.mrope_section is None:
        raise ConfigError("rope_parameters.mrope_section is missing: only M-RoPE is supported")
    head_dim = or_default(text.head_dim, head_dim)
    if head_dim is None:
        require(
            text.hidden_size % text.num_attention_heads == 0,
            f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads "
            f"{text.num_attention_heads}",
        )
        head_dim = text.hidden_size // text.num_attention_heads
    return DecoderConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=or_default(text.num_key_value_heads, text.num_attention_heads),
        head_dim=head_dim,
        mlp_width=text.intermediate_size,
        norm_eps=or_default(text.rms_norm_eps, norm_eps),
        rope_base=or_default(rope.rope_theta, or_default(text.rope_theta, rope_base)),
        mrope_section=(rope.mrope_section if mrope else None) or (head_dim // 2, 0, 0),
        mrope_interleaved=mrope_interleaved,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        causal=or_default(text.is_causal, True),
    )


def _check_processor(
    processor: ImageProcessorFields, vision: VisionConfig, images: ImageConfig
) -> None:
    """Check that an image processor prepares images as the tower reads them."""
    for name, expected in _cuts(vision, images).items():
        cut = or_default(getattr(processor, name), expected)
        require(
            cut == expected,
            f"image processor.{name} {cut} is not that of config.json, {expected}",
        )
    rescale = or_default(processor.rescale_factor, 1 / 255)
    require(
        math.isclose(rescale, 1 / 255, rel_tol=1e-6),
        f"image processor.rescale_factor {rescale} is not supported, only 1/255",
    )


def _cuts(vision: VisionConfig, images: ImageConfig) -> dict[str, int]:
    """Return the fields of an image processor that say how images are cut.

    One that merges what is merged and then pooled counts the right visual tokens. transformers,
    which does not pool, refuses them: it would give other vectors.
    """
    return {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size * images.spatial_pool_stride,
    }


def or_default(value: Value | None, default: Value) -> Value:
    """Return a value, or the default of transformers if it is missing or null."""
    return default if value is None else value


def decoder_fields(decoder: DecoderConfig, *, mrope: bool) -> dict[str, Any]:
    """Return the fields of config.json that say what a decoder is, as transformers 5 has them."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": decoder.rope_base}
    if mrope:
        rope["mrope_section"] = list(decoder.mrope_section)
    if decoder.mrope_interleaved:
        rope["mrope_interleaved"] = True
    attention = {} if decoder.causal else {"is_causal": False}
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "intermediate_size": decoder.mlp_width,
        "rms_norm_eps": decoder.norm_eps,
        "rope_parameters": rope,
        **attention,
    }


def written(
    config: ModelConfig,
    source: Mapping[str, Any],
    *,
    model_type: str,
    architecture: str,
    text: dict[str, Any],
    tower: dict[str, Any],
) -> dict[str, Any]:
    """Return the config.json of a model of tower and decoder, in the form transformers 5 writes.

    Fields of `source` that say nothing about shapes are kept as they are. The head is not part
    of an embedder; `tie_word_embeddings` says so to the classes that would look for one.

    Args:
        config: The model.
        source: The config.json it came from.
        model_type: Name of the family in transformers.
        architecture: Class in transformers.
        text: Fields of `text_config`, in place of those of `source`.
        tower: Fields of `vision_config`, in place of those of `source`.
    """
    dropped = (*_FLAT_TEXT, "torch_dtype")
    hf = {key: value for key, value in copy.deepcopy(dict(source)).items() if key not in dropped}
    kept = hf.get("text_config") or {key: source[key] for key in _FLAT_TEXT if key in source}
    for outdated in OUTDATED_TEXT:
        kept.pop(outdated, None)
    return hf | {
        "model_type": model_type,
        "architectures": [architecture],
        "tie_word_embeddings": True,
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": kept | {"model_type": f"{model_type}_text"} | text,
        "vision_config": (hf.get("vision_config") or {})
        | {"model_type": f"{model_type}_vision"}
        | tower,
        CONFIG_KEY: saved_fields(config),
    }


def saved_fields(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json holds for this package alone."""
    return {
        "kept_layers": list(config.kept_layers),
        "images": vars(config.images).copy(),
        "prompt": vars(config.prompt).copy(),
        **({"widths": list(config.widths)} if config.widths else {}),
        **({"exit_layers": list(config.exit_layers)} if config.exit_layers else {}),
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
        **_cuts(vision, limits),
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def patch_convolution(key: str) -> Callable[[ModelConfig], dict[str, tuple[int, ...]]]:
    """Return the function from a model to the shape of its patch convolution on disk, by key.

    The axes are outputs, channels, frames, side, side.
    """

    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        vision = config.vision
        side = vision.patch_size
        shape = (vision.width, vision.channels, vision.temporal_patch_size, side, side)
        return {key: shape}

    return shapes
