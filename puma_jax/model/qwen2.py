"""The family Qwen2: a decoder with biases of queries, keys and values."""

from puma_jax.model.text_decoder import text_family

FAMILY = text_family("qwen2", "Qwen2", qkv_bias=True)
