"""The family Llama, of which SmolLM2 is one: a decoder without biases."""

from puma_jax.model.text_decoder import text_family

FAMILY = text_family("llama", "Llama")
