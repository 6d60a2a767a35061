"""The OpenMoji demo benchmark: all eight tasks of M-BEIR, built on any machine in a minute.

`python -m puma_jax.data.openmoji --out DIR` builds it from the packages of the `demo` extra. See
docs/openmoji.md for its contents, the source of its ground truth, and its split.
"""

from puma_jax.data.demo.settings import Settings
from puma_jax.data.openmoji.build import build

__all__ = ["Settings", "build"]
