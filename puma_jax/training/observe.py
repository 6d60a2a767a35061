"""What a step costs: traces of chosen steps, the most memory that was in use."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import jax


class Trace:
    """A profile of some steps, for XProf, TensorBoard's profile page or Perfetto."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        """Choose the steps.

        Args:
            folder: Where the profile goes.
            steps: The first and the last of them, counted from 1; None for no profile.
        """
        self._folder = folder
        self._first, self._last = steps or (0, 0)
        self._running = False

    def before(self, step: int) -> None:
        """Begin if it is the first of them."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """End once the last of them is computed."""
        if step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End, also when the run stops in the middle."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def most_memory() -> int:
    """Return the most bytes in use so far: of the first device, or of the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
