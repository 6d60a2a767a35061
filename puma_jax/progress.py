"""Progress of long work: a bar on a terminal, elsewhere plain lines that keep a log readable."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30
_LINE = "{desc}{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"
_LINE_WITHOUT_TOTAL = "{desc}{n_fmt}, {rate_fmt}{postfix}"


class Progress:
    """Shows on stderr how far work has come; a context manager, and safe to use in threads.

    On a terminal it is tqdm's bar. Elsewhere it is a line with count, rate and time left, at most
    every `SECONDS_BETWEEN_LINES`, and one at the end; work that ends sooner prints none.

    Args:
        total: Units of all the work; None if unknown.
        desc: What is done, such as "embedding".
        unit: What is counted, in the singular.
        unit_scale: Whether to shorten counts to k, M, G.
        initial: Units that were done before.
        delay: Seconds until a bar appears.
        disable: Whether to show nothing.
    """

    def __init__(
        self,
        *,
        total: int | None,
        desc: str | None = None,
        unit: str = "item",
        unit_scale: bool = False,
        initial: int = 0,
        delay: float = 0,
        disable: bool = False,
    ):
        self._settings: dict[str, Any] = {
            "total": total,
            "unit": unit,
            "unit_scale": unit_scale,
            "initial": initial,
        }
        self._desc, self._count, self._postfix = desc, initial, ""
        self._started = self._last_line = time.monotonic()
        self._count_of_last_line = initial
        self._lock = threading.Lock()
        self._disable = disable or sys.stderr is None
        self._bar: tqdm | None = None
        if not self._disable and sys.stderr.isatty():
            self._bar = tqdm(**self._settings, desc=desc, delay=delay, smoothing=0.05)

    def update(self, count: int = 1) -> None:
        """Count units that are done."""
        with self._lock:
            self._count += count
            if self._bar is not None:
                self._bar.update(count)
            elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
                self._print_line()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set what is shown behind the count; a bar shows it at once, or with its next update."""
        with self._lock:
            self._postfix = text
            if self._bar is not None:
                self._bar.set_postfix_str(text, refresh)

    def write(self, line: str) -> None:
        """Print a line to stdout, above the bar if there is one; nothing if it is disabled."""
        with self._lock:
            if self._bar is not None:
                self._bar.write(line)
            elif not self._disable:
                print(line, flush=True)

    def close(self) -> None:
        """Show the final count."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            elif time.monotonic() - self._started >= SECONDS_BETWEEN_LINES:
                self._print_line()
            self._disable = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print_line(self) -> None:
        """Print a line, whose rate is that since the line before it."""
        if self._disable:
            return
        now = time.monotonic()
        elapsed, done = now - self._last_line, self._count - self._count_of_last_line
        # The first unit alone says nothing: a step compiles its program.
        first = self._count - self._settings["initial"] <= 1
        line = tqdm.format_meter(
            self._count,
            elapsed=0 if first else now - self._started,
            rate=done / elapsed if done and elapsed and not first else None,
            prefix=f"{self._desc}: " if self._desc else "",
            postfix=self._postfix,
            bar_format=_LINE if self._settings["total"] is not None else _LINE_WITHOUT_TOTAL,
            **self._settings,
        )
        print(line, file=sys.stderr, flush=True)
        self._last_line, self._count_of_last_line = now, self._count
