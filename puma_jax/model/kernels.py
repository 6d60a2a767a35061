"""Attention kernels by name: what each needs, and which one "auto" takes."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import jax

from puma_jax.axes import TILE
from puma_jax.errors import AttentionError

NAMES = ("xla", "splash", "mosaic", "triton", "cudnn")
"""XLA's own; Pallas for TPUs; tokamax's for new and for older NVIDIA GPUs; cuDNN's."""
TOKAMAX = "0.0.17"
"""The version of tokamax whose results were compared: segments go through a private module of it.
The extra "cuda" pins it."""

_ON_GPUS = ("mosaic", "triton", "cudnn")  # fastest first
# Compute capabilities that each runs on: from the first, below the second.
_CARDS = {"mosaic": (9.0, 11.0), "triton": (8.0, 100.0), "cudnn": (8.0, 100.0)}
_WIDEST_HEAD = {8: 128, 9: 256}  # of cuDNN, by the first number of the compute capability


@dataclass(frozen=True)
class Target:
    """The device that attention is computed on, and the dtype and sizes of its inputs."""

    platform: str
    dtype: str
    length: int
    """Positions in a row."""
    head_dim: int


def choose(target: Target) -> str:
    """Return the kernel that "auto" takes: the fastest that runs.

    Rows that are shorter than a tile go to XLA: a kernel would compute padding for the most part.
    """
    candidates: tuple[str, ...] = {"tpu": ("splash",), "gpu": _ON_GPUS}.get(target.platform, ())
    if target.length < TILE:
        return "xla"
    return next((name for name in candidates if _problem(name, target) is None), "xla")


def check(name: str, target: Target) -> None:
    """Check that a kernel can compute a target.

    Raises:
        AttentionError: There is no such kernel, or it cannot.
    """
    if name not in NAMES:
        raise AttentionError(
            f'attention implementation "{name}" is not one of {", ".join(["auto", *NAMES])}'
        )
    problem = _problem(name, target)
    if problem is not None:
        raise AttentionError(f'attention "{name}" {problem}: ask for "auto" or "xla"')


def describe(name: str, platform: str, dtype: str) -> str:
    """Return one line that names the kernel used for whole tiles, and why if it was chosen.

    Raises:
        AttentionError: There is no such kernel, or it cannot run on this platform.
    """
    target = Target(platform, dtype, TILE, 128)
    if name != "auto":
        check(name, target)
        return f"attention: {name} ({platform})"
    chosen = choose(target)
    if platform == "tpu":
        return f"attention: splash (auto, tpu), xla in rows that are not a multiple of {TILE}"
    if platform != "gpu":
        return f"attention: {chosen} (auto, {platform})"
    best = _ON_GPUS[0]
    why = "" if chosen == best else f"; {best} {_problem(best, target)}"
    elsewhere = "" if chosen == "xla" else f", xla in rows of fewer than {TILE}"
    if chosen == "cudnn":
        elsewhere += " or of heads that cuDNN does not take"
    return f"attention: {chosen} (auto, gpu{why}){elsewhere}"


def _problem(name: str, target: Target) -> str | None:
    """Return why a kernel cannot compute a target, and what to do; None if it can."""
    if name == "xla":
        return None
    if name == "splash":
        if target.platform != "tpu":
            return f"runs on TPUs and this is {target.platform}"
        if target.length % TILE:
            return f"takes rows of a multiple of {TILE} positions and these have {target.length}"
        return None
    return _problem_of_card(name, target) or _problem_of_values(name, target)


def _problem_of_card(name: str, target: Target) -> str | None:
    """Return what a kernel for NVIDIA GPUs lacks on this machine."""
    if target.platform != "gpu":
        return f"runs on NVIDIA GPUs and this is {target.platform}"
    first, end = _CARDS[name]
    capability = _compute_capability()
    if capability is None or not first <= capability < end:
        wanted = f"{first} or more" if end >= 100 else f"{first} to below {end}"
        found = "is unknown" if capability is None else f"is {capability}"
        return f"needs a compute capability of {wanted} and that of this GPU {found}"
    version = _tokamax()
    if name == "cudnn" or version == TOKAMAX:
        return None
    there = "is not installed" if version is None else f"is {version} here"
    return (
        f"needs tokamax {TOKAMAX}, which {there} (run pip install -e '.[cuda]' in the clone of "
        f"puma_jax with Python 3.12 or newer, this is {platform.python_version()})"
    )


def _problem_of_values(name: str, target: Target) -> str | None:
    """Return what a kernel for NVIDIA GPUs does not compute."""
    if target.dtype not in ("bfloat16", "float16"):
        return f"computes in bfloat16 or float16 and this is {target.dtype}"
    if name != "cudnn":
        return None
    if target.length % 2:
        return f"takes rows of an even number of positions and these have {target.length}"
    widest = _WIDEST_HEAD.get(int(_compute_capability() or 0), max(_WIDEST_HEAD.values()))
    if target.head_dim % 8 or target.head_dim > widest:
        return f"takes heads of a multiple of 8 up to {widest} and these have {target.head_dim}"
    return None


def _compute_capability() -> float | None:
    """Return the lowest compute capability of this process's GPUs; None if one has none."""
    try:
        return min(float(device.compute_capability) for device in jax.local_devices(backend="gpu"))
    except (RuntimeError, AttributeError, ValueError):  # no GPU here, or one of another maker
        return None


def _tokamax() -> str | None:
    """Return the version of tokamax that is installed; None if none is."""
    try:
        return importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return None
