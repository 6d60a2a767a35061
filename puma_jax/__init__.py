"""Unified multimodal retrieval with layer-pruned multimodal LLMs, in JAX and Flax."""

import os
from typing import TYPE_CHECKING

# transformers, where torch is not installed, warns at every import that its models are missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from puma_jax.embedder import Embedder
    from puma_jax.reranker import Reranker

__all__ = ["Embedder", "Reranker"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the public face when it is asked for: `import puma_jax` alone costs nothing."""
    if name == "Embedder":
        from puma_jax.embedder import Embedder

        return Embedder
    if name == "Reranker":
        from puma_jax.reranker import Reranker

        return Reranker
    raise AttributeError(f"module 'puma_jax' has no attribute {name!r}")
