"""The cost of steps: a profile of some of them, and the peak memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Profiles some steps, for XProf, TensorBoard's profile page or Perfetto."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        """Choose the steps.

        Args:
            folder: Folder that the profile is written to.
            steps: First and last step of the profile, counted from 1; None for no profile.
        """
        self._folder = folder
        self._first, self._last = steps or (0, 0)
        self._running = False

    def before(self, step: int) -> None:
        """Start the profile if this is its first step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Stop the profile if this is its last step, once the step is computed."""
        if step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Stop the profile if it is running, also when training stops early."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def peak_memory() -> int:
    """Return the peak memory so far, in bytes: of the first device, or of the process on CPUs."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
