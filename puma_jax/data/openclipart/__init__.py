"""A benchmark of public domain clip art, built from a Debian package.

`python -m puma_jax.data.openclipart --out DIR` builds it from the package openclipart-svg and the
`demo` extra. See docs/openclipart.md for its contents and its split.
"""

from puma_jax.data.openclipart.build import Settings, build

__all__ = ["Settings", "build"]
