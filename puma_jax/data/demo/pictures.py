"""Render SVG files, write the pictures, and find those that look alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from puma_jax.data.demo.packages import demo_package
from puma_jax.data.demo.split import connected
from puma_jax.data.images import open_image
from puma_jax.progress import Progress
from puma_jax.typing import UInt8, ndarray

_GRID = 14  # cells per side of the coarse picture that is compared first

_Result = TypeVar("_Result")


def rasterize(svg: str, width: int | None, height: int | None) -> UInt8[ndarray, "height width 3"]:
    """Return an SVG as pixels on white, without text in fonts of the machine.

    Args:
        svg: Content of the file.
        width: Width in pixels; None follows the height.
        height: Height in pixels; None follows the width.

    Raises:
        ConfigError: The demo packages are not installed.
        ValueError: The SVG cannot be rendered.
    """
    png = demo_package("resvg_py").svg_to_bytes(
        svg_string=svg,
        width=width,
        height=height,
        background="white",
        skip_system_fonts=True,
        dpi=96,  # of CSS; without it, a size in points or millimeters is none
    )
    return np.asarray(open_image(png))


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


def _contrast(a: UInt8[ndarray, "size size 3"], b: UInt8[ndarray, "size size 3"]) -> int:
    """Return the largest difference between two pictures, in levels of a channel."""
    return int((np.maximum(a, b) - np.minimum(a, b)).max())
