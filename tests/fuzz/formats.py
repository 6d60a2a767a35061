"""Every kind of file that puma_jax reads, as `python -m tests.fuzz` damages it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import Target

Build = Callable[[Path], Target]
"""Makes a small sound file in an empty folder, and says what reads it."""

FORMATS: dict[str, Build] = {}
