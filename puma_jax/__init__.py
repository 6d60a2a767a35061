"""Unified multimodal retrieval with layer-pruned multimodal LLMs, in JAX and Flax."""

__version__ = "0.1.0"
