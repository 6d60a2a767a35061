"""Builds training data from a folder in M-BEIR layout; see `build`."""

from puma_jax.data.builder.build import Settings, build

__all__ = ["Settings", "build"]
