"""What the routes of the service share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from puma_jax.embedder import Embedder
from puma_jax.search.index import Index
from puma_jax.service.batching import Batcher
from puma_jax.service.metrics import Metrics
from puma_jax.service.request_errors import RequestError
from puma_jax.service.requests import Bodies, Body, parse, within
from puma_jax.service.settings import ServiceConfig

Answer = TypeVar("Answer")

_SEARCH_THREADS = 4


@dataclass
class Service:
    """The model, the index, and what serves them."""

    embedder: Embedder
    index: Index | None
    """The documents to search; None for a service that only embeds."""
    name: str
    """Name of the model in requests and answers."""
    settings: ServiceConfig
    metrics: Metrics = field(default_factory=Metrics)
    stopping: bool = False
    """Whether new requests are refused."""
    in_flight: int = 0
    """Requests being answered."""

    def __post_init__(self) -> None:
        """Make what encodes, reads bodies, and searches."""
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        self.batcher = Batcher(self.embedder, self.settings, self.metrics)
        self.bodies = Bodies(self.settings, self.metrics)
        self.searchers = ThreadPoolExecutor(_SEARCH_THREADS, "search")

    def close(self) -> None:
        """End all threads, and let go of the index."""
        self.batcher.stop()
        self.searchers.shutdown(cancel_futures=True)
        if self.index is not None:
            self.index.close()

    async def answer(
        self, request: Request, model: type[Body], work: Callable[[Any], Awaitable[Answer]]
    ) -> Answer:
        """Return what some work makes of a JSON body, within the limits of the service.

        Args:
            request: The request.
            model: What its body must hold.
            work: Called with an instance of `model`.

        Raises:
            RequestError: The body is refused, or time is up.
        """
        async with self.bodies.read(request, "application/json") as body:
            parsed = await parse(body, model)
            return await within(self.settings.request_seconds, request, work(parsed))

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model: vectors of two models are never comparable.

        Raises:
            RequestError: The request names another model.
        """
        if name is not None and name != self.name:
            raise RequestError(
                404,
                "model_not_found",
                f'model is "{name[:200]}", this service has "{self.name}"',
            )

    def check_items(self, count: int) -> None:
        """Refuse no items, and more than a request may have.

        Raises:
            RequestError: There are none, or too many.
        """
        if not 1 <= count <= self.settings.max_items:
            raise RequestError(
                400,
                "invalid_request",
                f"a request has {count} items, expected 1 to {self.settings.max_items}",
            )

    def check_texts(self, texts: Sequence[str | None]) -> None:
        """Refuse texts of too many characters, which would be read for nothing.

        Raises:
            RequestError: A text is too long.
        """
        longest = max((len(text or "") for text in texts), default=0)
        if longest > self.settings.max_text_chars:
            raise RequestError(
                400,
                "text_too_long",
                f"a text has {longest:,} characters, more than the "
                f"{self.settings.max_text_chars:,} that are read: shorten it",
            )
