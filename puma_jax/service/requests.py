"""Requests in: bodies read within limits, parsed, and given up when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect

from puma_jax.service.metrics import Metrics
from puma_jax.service.request_errors import RequestError, overloaded
from puma_jax.service.settings import ServiceConfig

Parsed = TypeVar("Parsed")
Answer = TypeVar("Answer")

LARGE_ANSWER = 8192
"""Values of vectors that take long to write."""

_MB = 1_000_000
_LARGE_BODY = 65_536
_ERRORS_SHOWN = 3
_FIELDS_IN_FORM = 16


class Body(BaseModel):
    """The body of a request: fields that it does not declare are refused, types are not guessed."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


class Bodies:
    """Reads bodies, and counts the bytes of all that are held."""

    def __init__(self, settings: ServiceConfig, metrics: Metrics):
        """Start with no bytes held."""
        self.settings, self.metrics = settings, metrics
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, media_type: str) -> AsyncIterator[bytes]:
        """Yield the body of a request, which counts as held until the block ends.

        Args:
            request: The request.
            media_type: Media type that the body must have.

        Raises:
            RequestError: The body is too large, too slow or of another type, or too many are held.
        """
        found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if found != media_type:
            raise RequestError(
                415,
                "unsupported_media_type",
                f'Content-Type is "{found[:100]}", expected {media_type}',
            )
        self._check(_announced(request))
        parts: list[bytes] = []
        try:
            await self._fill(parts, request)
            yield b"".join(parts)
        finally:
            self._hold(-sum(map(len, parts)))

    async def _fill(self, parts: list[bytes], request: Request) -> None:
        """Read the parts of a body, each of which is held at once."""
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    parts.append(part)
                    self._hold(len(part))
                    self._check(size)
        except TimeoutError:
            raise RequestError(
                408,
                "request_timeout",
                f"the body did not arrive within {self.settings.body_seconds:g} seconds",
                {"Connection": "close"},
            ) from None

    def _hold(self, size: int) -> None:
        self._held += size
        self.metrics.body_bytes.set(self._held)

    def _check(self, size: int) -> None:
        """Refuse a body of this size, or one more while too many are held."""
        limit = self.settings.max_body_mb
        if size > limit * _MB:
            raise RequestError(
                413,
                "body_too_large",
                f"the body has more than the {limit:g} MB that are read: send fewer items, or "
                "smaller images",
                {"Connection": "close"},
            )
        if self._held > self.settings.max_bodies_mb * _MB:
            raise overloaded("the bodies of other requests fill the memory set aside: try later")


def _announced(request: Request) -> int:
    """Return the size that a request announces; 0 if it does not."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 19 else 0


async def in_thread_if(large: bool, function: Callable[..., Answer], *arguments: object) -> Answer:
    """Return what a function returns; what is large is done in a thread, beside other requests."""
    if large:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)


async def parse(body: bytes, model: type[Body]) -> Any:
    """Return a JSON body as an instance of a model; large ones are parsed in a thread.

    Raises:
        RequestError: It is no JSON, or holds something else than the model declares.
    """
    try:
        return await in_thread_if(len(body) > _LARGE_BODY, model.model_validate_json, body)
    except ValidationError as error:
        raise RequestError(400, "invalid_request", _describe(error)) from None


async def parse_form(body: bytes, request: Request, model: type[Body]) -> tuple[Any, bytes | None]:
    """Return a multipart body as an instance of a model, and the file "image" that it holds.

    Raises:
        RequestError: It is no such form, or holds something else than the model declares.
    """

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(
            request.headers,
            whole(),
            max_files=1,
            max_fields=_FIELDS_IN_FORM,
            max_part_size=len(body) + 1,
        ).parse()
    except Exception as error:  # whatever the headers of a part trip the parser over
        reason = getattr(error, "message", str(error))
        raise RequestError(400, "invalid_request", f"the form cannot be read: {reason}") from None
    file = None
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields[name] = value
            elif name == "image":
                file = await value.read()
            else:
                raise RequestError(
                    400, "invalid_request", f'the form has a file "{name[:80]}", expected "image"'
                )
    finally:
        await form.close()
    try:
        # All fields of a form are texts.
        return model.model_validate(fields, strict=False), file
    except ValidationError as error:
        raise RequestError(400, "invalid_request", _describe(error)) from None


def _describe(error: ValidationError) -> str:
    """Return the first of the things that are wrong with a body, on one line."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = []
    for one in found[:_ERRORS_SHOWN]:
        place = ".".join(str(part) for part in one["loc"])
        lines.append(f"{place[:100]}: {one['msg']}" if place else one["msg"])
    more = f" (and {len(found) - _ERRORS_SHOWN} more)" if len(found) > _ERRORS_SHOWN else ""
    return "; ".join(lines) + more


async def within(seconds: float, request: Request, work: Awaitable[Answer]) -> Answer:
    """Return what some work returns; it is cancelled when time is up or the client leaves.

    Raises:
        RequestError: Time is up.
        ClientDisconnect: The client has left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait(
            {task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if gone in done:
            raise ClientDisconnect
        raise RequestError(
            504, "timeout", f"there is no answer within {seconds:g} seconds: try again later"
        )
    finally:
        for one in (task, gone):
            one.cancel()


async def _disconnected(request: Request) -> None:
    """Return when the client of a request, whose body has been read, is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
