"""The OpenMoji demo benchmark: all eight tasks of M-BEIR, built on any machine in a minute.

`python -m puma_jax.data.openmoji --out DIR` makes it from packages of the `demo` extra. What it
holds, how its truth is known, and what its split promises is in docs/openmoji.md.
"""

from puma_jax.data.openmoji.build import Settings, build

__all__ = ["Settings", "build"]
