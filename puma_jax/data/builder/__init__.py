"""From a folder in M-BEIR layout to tables that are read by row: see `build`."""

from puma_jax.data.builder.build import Settings, build

__all__ = ["Settings", "build"]
