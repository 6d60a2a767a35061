"""The fields that are read from the JSON files of a Hugging Face folder, their types and ranges.

A field that is None is missing or null. All other fields of these files are kept as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from puma_jax.config import ImageConfig, Layers, Positive, PromptConfig, Side, VocabSize, Width
from puma_jax.schema import Count, CountOrZero, Range

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class RopeFields:
    """`rope_parameters`, or `rope_scaling` of hub files."""

    mrope_section: tuple[CountOrZero, CountOrZero, CountOrZero] | None = None
    rope_theta: Positive | None = None
    mrope_interleaved: bool | None = None
    rope_type: Literal["default", "mrope"] | None = None
    type: Literal["default", "mrope"] | None = None


@dataclass(frozen=True)
class DecoderFields:
    """`text_config`, or the top level of config.json in hub files."""

    vocab_size: VocabSize
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    intermediate_size: Width
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    attention_bias: bool | None = None
    mlp_bias: Literal[False] | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    rope_parameters: RopeFields | None = None
    rope_scaling: RopeFields | None = None
    hidden_act: Literal["silu"] | None = None
    use_sliding_window: Literal[False] | None = None
    is_causal: bool | None = None
    """Whether attention is causal: transformers 5 reads it, too."""


@dataclass(frozen=True)
class TowerFields:
    """Fields of `vision_config` that every family has."""

    depth: Layers | None = None
    num_heads: Width | None = None
    hidden_size: Width | None = None
    in_channels: Literal[3] | None = None
    in_chans: Literal[3] | None = None
    patch_size: Side | None = None
    temporal_patch_size: Side | None = None
    spatial_merge_size: Side | None = None


@dataclass(frozen=True)
class SavedFields:
    """The fields that this package adds to a config.json."""

    images: ImageConfig | None = None
    prompt: PromptConfig = PromptConfig()
    kept_layers: tuple[CountOrZero, ...] = ()
    widths: tuple[Count, ...] = ()
    exit_layers: tuple[Count, ...] = ()
    causal: bool | None = None
    """Whether attention was causal when an adapter was trained; a model has it elsewhere."""


@dataclass(frozen=True)
class ModelFields:
    """config.json."""

    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    image_token_id: CountOrZero | None = None
    vision_start_token_id: CountOrZero | None = None
    vision_end_token_id: CountOrZero | None = None
    puma_jax: SavedFields | None = None


@dataclass(frozen=True)
class ImageProcessorFields:
    """preprocessor_config.json, or `image_processor` of processor_config.json."""

    image_mean: Triple | None = None
    image_std: tuple[Positive, Positive, Positive] | None = None
    patch_size: Side | None = None
    temporal_patch_size: Side | None = None
    merge_size: Side | None = None
    resample: Literal[3] | None = None
    """Bicubic, as Pillow numbers filters."""
    rescale_factor: float | None = None
    do_resize: Literal[True] | None = None
    do_rescale: Literal[True] | None = None
    do_normalize: Literal[True] | None = None


@dataclass(frozen=True)
class TokenizerFields:
    """tokenizer_config.json."""

    additional_special_tokens: list[Any] | None = None
    added_tokens_decoder: dict[str, Any] | None = None
    model_max_length: Annotated[float, Range(1)] | None = None


@dataclass(frozen=True)
class WeightIndex:
    """model.safetensors.index.json."""

    weight_map: dict[str, str] = field(default_factory=dict)
    """Name of a tensor → name of its file in the same folder."""
