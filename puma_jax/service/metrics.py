"""Metrics of the service, as Prometheus reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """The metrics of one service; each service has its own, so that a process may hold several."""

    def __init__(self) -> None:
        """Make metrics that are all zero."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "puma_requests",
            "Requests that were answered.",
            ["route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "puma_request_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "puma_requests_in_flight", "Requests being answered.", registry=self.registry
        )
        self.body_bytes = Gauge(
            "puma_body_bytes", "Bytes of the bodies that are held.", registry=self.registry
        )
        self.waiting = Gauge(
            "puma_items_waiting",
            "Items that are preprocessed, queued or encoded.",
            registry=self.registry,
        )
        self.batch_items = Histogram(
            "puma_batch_items",
            "Items that were encoded together.",
            buckets=_ITEMS,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "puma_batch_seconds",
            "Time to encode the items of a batch.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.search_seconds = Histogram(
            "puma_search_seconds",
            "Time to search the index.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        compilations = Gauge(
            "puma_compilations",
            "Programs that XLA has compiled in this process; it stays the same once ready.",
            registry=self.registry,
        )
        compilations.set_function(compilation_count())

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


@functools.cache
def compilation_count() -> Callable[[], int]:
    """Return a function that says how many programs were compiled since the first call of this."""
    durations: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    return lambda: len(durations)
