"""The family Qwen3: a decoder that normalizes queries and keys."""

from puma_jax.model.text_decoder import text_family

FAMILY = text_family("qwen3", "Qwen3", head_dim=128, qk_norm=True)
