"""What every request passes: host, key, and the state of the service; and every answer: headers."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
import traceback
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puma_jax.errors import PumaError
from puma_jax.service.request_errors import (
    RequestError,
    as_request_error,
    error_body,
    overloaded,
)
from puma_jax.service.state import Service

OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/assets/")
"""Paths that need no key: the page's own files, which hold nothing, and the probes."""

# Scripts, styles and connections are the page's own; nothing is loaded from other hosts.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """Lets requests through to the app, and turns what goes wrong into an answer."""

    def __init__(self, app: ASGIApp, service: Service, key: str | None):
        """Wrap an app.

        Args:
            app: The app behind the gate.
            service: The service whose settings hold, and which may be stopping.
            key: Key that clients must send; None for none.
        """
        self.app, self.service, self._key = app, service, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service = self.service
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        service.in_flight += 1
        try:
            self._check(scope)
            await self.app(scope, receive, answer)
        except ClientDisconnect:
            status = status or 499  # as proxies count clients that have left
        except asyncio.CancelledError:
            status = status or 499
            raise
        except Exception as error:
            if status:  # the answer has begun, and cannot be changed
                raise
            await _refuse(error, scope, answer)
        finally:
            service.in_flight -= 1
            route = getattr(scope.get("route"), "path", "other")
            service.metrics.requests.labels(route, str(status)).inc()
            service.metrics.request_seconds.labels(route).observe(time.perf_counter() - start)

    def _check(self, scope: Scope) -> None:
        """Refuse a request for another host, without the key, or while the service stops."""
        headers, hosts = Headers(scope=scope), self.service.settings.hosts
        host = _without_port(headers.get("host", ""))
        if hosts and host not in hosts:
            raise RequestError(
                403,
                "host_not_allowed",
                f'Host is "{host[:200]}", expected one of {", ".join(hosts)}; see '
                "--service.allowed-hosts",
            )
        path = scope["path"]
        is_open = any(
            path.startswith(known) if known.endswith("/") and known != "/" else path == known
            for known in OPEN_PATHS
        )
        if self._key is not None and not is_open:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Compared as bytes, in a time that does not tell how much of it is right.
            right = secrets.compare_digest(given.strip().encode(), self._key.encode())
            if scheme.lower() != "bearer" or not right:
                raise RequestError(
                    401,
                    "invalid_api_key",
                    'the key is missing or wrong: send it as "Authorization: Bearer KEY"',
                    {"WWW-Authenticate": "Bearer"},
                )
        if self.service.stopping and path not in ("/health", "/ready", "/metrics"):
            raise RequestError(
                503, "stopping", "the service stops: call another one", {"Retry-After": "5"}
            )
        if self.service.in_flight > self.service.settings.max_requests and not is_open:
            raise overloaded("too many requests are being answered: try again later")


async def _refuse(error: Exception, scope: Scope, send: Send) -> None:
    """Answer with what an error says, if the request caused it, or with status 500."""
    refusal = as_request_error(error) if isinstance(error, PumaError) else None
    if refusal is None:
        traceback.print_exception(error, file=sys.stderr)
        refusal = RequestError(
            500, "internal_error", "the service failed on this request; its log says how"
        )
    body = json.dumps(error_body(scope["path"], refusal), ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **{name.lower(): value for name, value in refusal.headers.items()},
    }
    raw: list[Any] = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})


def _without_port(host: str) -> str:
    """Return the name or address in a Host header.

    >>> _without_port("[::1]:8000"), _without_port("localhost:8000")
    ('::1', 'localhost')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
