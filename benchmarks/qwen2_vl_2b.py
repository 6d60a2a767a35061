"""Qwen2-VL-2B, with all of its layers or fewer, for benchmarks that need no download; its FLOPs."""

import dataclasses

from puma_jax.config import ModelConfig
from puma_jax.model.qwen2_vl import PUBLISHED

MODEL = PUBLISHED["Qwen/Qwen2-VL-2B-Instruct"]


def config(
    layers: int = MODEL.decoder.layers, vision_layers: int = MODEL.vision.layers
) -> ModelConfig:
    """Return the published config with this many layers in the decoder and in the vision tower."""
    return dataclasses.replace(
        MODEL.with_layers(tuple(range(layers))),
        vision=dataclasses.replace(MODEL.vision, layers=vision_layers),
    )


def toy() -> ModelConfig:
    """Return a model of the same kind that any machine runs at once."""
    small = config(2, 1)
    return dataclasses.replace(
        small,
        image_token_id=509,
        vision_start_token_id=510,
        vision_end_token_id=511,
        decoder=dataclasses.replace(
            small.decoder, vocab_size=512, width=64, heads=4, kv_heads=2, head_dim=16,
            mlp_width=96, mrope_section=(2, 3, 3),
        ),
        vision=dataclasses.replace(small.vision, width=32, heads=2, mlp_width=64, out_width=64),
    )  # fmt: skip


def decoder_flops(model: ModelConfig, tokens: int, length: int) -> float:
    """Return the forward FLOPs of the decoder over rows of `length` tokens, with attention."""
    decoder = model.decoder
    inner, kv = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    linear = decoder.width * (2 * inner + 2 * kv + 3 * decoder.mlp_width)
    return tokens * decoder.layers * (2 * linear + 4 * length * inner)


def vision_flops(model: ModelConfig, patches: int, length: int) -> float:
    """Return the forward FLOPs of the tower over rows of `length` patches, with attention."""
    vision = model.vision
    linear = vision.width * (4 * vision.width + 2 * vision.mlp_width)
    joined = vision.width * vision.merged
    merger = joined * (joined + vision.out_width) / vision.merged
    block = vision.layers * (2 * linear + 4 * length * vision.width)
    return patches * (2 * vision.patch_values * vision.width + block + 2 * merger)
