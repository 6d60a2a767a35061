"""Unified multimodal retrieval with layer-pruned multimodal LLMs, in JAX and Flax."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puma_jax.embedder import Embedder

__all__ = ["Embedder"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the public face when it is asked for: `import puma_jax` alone costs nothing."""
    if name == "Embedder":
        from puma_jax.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'puma_jax' has no attribute {name!r}")
