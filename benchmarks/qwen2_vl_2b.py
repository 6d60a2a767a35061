"""The shapes of Qwen2-VL-2B, whole or cut, for benchmarks that need no download."""

from puma_jax.config import DecoderConfig, ModelConfig, VisionConfig


def config(layers: int = 28, vision_layers: int = 32) -> ModelConfig:
    """Return the published configuration with so many layers in each half."""
    return ModelConfig(
        family="qwen2_vl",
        vision=VisionConfig(
            layers=vision_layers, width=1280, heads=16, mlp_width=5120, out_width=1536
        ),
        decoder=DecoderConfig(
            vocab_size=151936,
            width=1536,
            layers=layers,
            heads=12,
            kv_heads=2,
            head_dim=128,
            mlp_width=8960,
        ),
        image_token_id=151655,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


def decoder_flops(model: ModelConfig, tokens: int, length: int) -> float:
    """FLOPs of a forward pass of the decoder over rows of `length` tokens, attention included."""
    decoder = model.decoder
    inner, kv = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    linear = decoder.width * (2 * inner + 2 * kv + 3 * decoder.mlp_width)
    return tokens * decoder.layers * (2 * linear + 4 * length * inner)


def vision_flops(model: ModelConfig, patches: int, length: int) -> float:
    """FLOPs of a forward pass of the tower over rows of `length` patches, attention included."""
    vision = model.vision
    linear = vision.width * (4 * vision.width + 2 * vision.mlp_width)
    joined = vision.width * vision.merged
    merger = joined * (joined + vision.out_width) / vision.merged
    block = vision.layers * (2 * linear + 4 * length * vision.width)
    return patches * (2 * vision.patch_values * vision.width + block + 2 * merger)
