"""Threads that prepare items: those of all cores, shared by all that reads items."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

AHEAD = 64
"""Results that are made ahead of the one asked for."""


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Yield the result of a function for each item, in order, from threads of all cores.

    They work up to 64 items ahead of what is asked for, so items are read a little early. The
    first error in the order of the items is raised, and what was not begun is dropped.

    The function must not wait for `in_threads` itself: all threads could come to wait.
    """
    return ordered(_items, function, items, AHEAD)


def executor() -> Executor:
    """Return the threads of all cores."""
    return _items


def ordered(
    executor: Executor, function: Callable[[T], U], items: Iterable[T], ahead: int
) -> Iterator[U]:
    """Yield the result of a function for each item, in order.

    Args:
        executor: Calls the function.
        function: Called once for each item.
        items: Read as they are needed.
        ahead: Results that are made ahead of the one asked for.
    """
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _make_threads() -> None:
    global _items
    _items = ThreadPoolExecutor(usable_cores(), "items")


_make_threads()
# A child of a fork has none of the threads of its parent.
os.register_at_fork(after_in_child=_make_threads)
