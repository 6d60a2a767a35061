"""The settings of a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from puma_jax.data.threads import usable_cores
from puma_jax.errors import ConfigError
from puma_jax.schema import Count, Range, check

_SIZE_UNIT = 28  # 2 × 2 patches of 14 pixels, one visual token


@dataclass(frozen=True)
class Settings:
    """Settings of a build; the same settings and packages give the same bytes."""

    out: Path
    """Folder to write; it must be missing, empty, or a finished build with these settings."""
    seed: int = 0
    """Seed of every random choice: which names are used, which combinations are held out."""
    size: Annotated[int, Range(_SIZE_UNIT, 64 * _SIZE_UNIT)] = 56
    """Width and height of the drawings in pixels, a multiple of 28; 56 gives 4 visual tokens."""
    workers: Count = usable_cores()
    """Rendering threads, by default one for each core that may be used; their number changes only
    the time."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: The size is not a multiple of 28, or the number of workers is below 1.
        """
        check(self)
        if self.size % _SIZE_UNIT:
            raise ConfigError(f"size {self.size} is not a multiple of {_SIZE_UNIT}, such as 56")
