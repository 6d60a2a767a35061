"""Settings of a model are checked when they are made."""

import pytest

from puma_jax.config import (
    ComputeConfig,
    DecoderConfig,
    ImageConfig,
    LoraConfig,
    PlanConfig,
    PromptConfig,
    VisionConfig,
)
from puma_jax.errors import ConfigError
from puma_jax.schema import from_json

VISION = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 64, "out_width": 64}
DECODER = {"vocab_size": 9, "width": 64, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 16}
DECODER |= {"mlp_width": 96, "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (VisionConfig, VISION | {"layers": -1}, "layers -1 must be in"),
        (VisionConfig, VISION | {"layers": 10**9}, "layers 1000000000 must be in"),
        (VisionConfig, VISION | {"heads": 3}, "vision.width 32 must be a multiple of 4"),
        (VisionConfig, VISION | {"window_size": 7}, "window_size 7 must be a multiple of"),
        (VisionConfig, VISION | {"deepstack_blocks": [1]}, "must name blocks below vision.layers"),
        (VisionConfig, VISION | {"channels": 1}, "channels 1 is not one of 3"),
        (VisionConfig, VISION | {"image_std": [1, 1, 0]}, "image_std[2] 0.0 must be above 0"),
        (DecoderConfig, DECODER | {"vocab_size": 10**9}, "vocab_size 1000000000 must be in"),
        (DecoderConfig, DECODER | {"kv_heads": 3}, "decoder.heads 4 is not a multiple of kv_heads"),
        (DecoderConfig, DECODER | {"head_dim": 8}, "must sum to half of head_dim 8"),
        (DecoderConfig, DECODER | {"norm_eps": -1e-6}, "norm_eps -1e-06 must be above 0"),
        (ImageConfig, {"min_pixels": 10**9}, "min_pixels 1000000000 must be in"),
        (
            ImageConfig,
            {"min_pixels": 9, "max_pixels": 8},
            "min_pixels 9 is above images.max_pixels",
        ),
        (ImageConfig, {"max_pixels": 0}, "max_pixels 0 must be in"),
        (PromptConfig, {"max_text_tokens": -1}, "max_text_tokens -1 must be in"),
        (PromptConfig, {"positions": "x"}, 'positions "x" is not one of mrope, 1d'),
        (PromptConfig, {"ret_token": ""}, 'prompt.ret_token "" must be printable'),
        (PromptConfig, {"ret_token": " a"}, 'prompt.ret_token " a" must be printable'),
        (LoraConfig, {"rank": 0}, "rank 0 must be in"),
        (LoraConfig, {"alpha": -1}, "alpha -1.0 must be above 0"),
        (LoraConfig, {"dropout": 1}, "dropout 1.0 must be in [0, 1)"),
        (LoraConfig, {"targets": []}, "lora.targets is empty"),
        (ComputeConfig, {"dtype": "float16"}, 'dtype "float16" is not one of float32, bfloat16'),
        (ComputeConfig, {"remat": "some"}, 'remat "some" is not one of'),
        (PlanConfig, {"batch_size": 0}, "batch_size 0 must be in"),
        (PlanConfig, {"seed": -1}, "seed -1 must be in"),
        (PlanConfig, {"balance_window": 0}, "balance_window 0 must be in"),
        (PlanConfig, {"hard_negatives": -1}, "hard_negatives -1 must be in"),
    ],
)
def test_a_setting_out_of_range_cannot_be_made(kind, fields, message):
    from_json(VisionConfig, VISION)
    from_json(DecoderConfig, DECODER)
    with pytest.raises(ConfigError) as error:
        from_json(kind, fields)
    assert message in str(error.value)


def test_a_fingerprint_outlives_options_that_a_model_does_not_use():
    plain = from_json(DecoderConfig, DECODER)
    assert repr(plain) == (
        "DecoderConfig(vocab_size=9, width=64, layers=1, heads=4, kv_heads=2, head_dim=16, "
        "mlp_width=96, norm_eps=1e-06, rope_base=1000000.0, mrope_section=(2, 3, 3))"
    )
    assert "qk_norm=True" in repr(from_json(DecoderConfig, DECODER | {"qk_norm": True}))
    assert "window" not in repr(from_json(VisionConfig, VISION))
    assert "window_size=8" in repr(from_json(VisionConfig, VISION | {"window_size": 8}))
