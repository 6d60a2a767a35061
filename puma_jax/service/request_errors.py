"""Answers to requests that are not served, in the shape of the API that was called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puma_jax.errors import ItemError, PumaError, SearchError


class RequestError(PumaError):
    """A request that is not served: its status, a code for programs, and a line for people."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ):
        """Refuse a request.

        Args:
            status: HTTP status, from 400 on.
            code: A word by which programs tell refusals of one status.
            message: The value found, what was expected, and what to do.
            headers: Further headers of the answer.
        """
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = dict(headers or {})


def as_request_error(error: PumaError) -> RequestError | None:
    """Return the refusal that an error stands for; None if the request did not cause it."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ItemError):
        return RequestError(400, "invalid_item", str(error))
    if isinstance(error, SearchError):
        return RequestError(400, "invalid_search", str(error))
    return None


def overloaded(message: str) -> RequestError:
    """Return the refusal of a request that could be served a little later."""
    return RequestError(429, "overloaded", message, {"Retry-After": "1"})


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(path: str, refusal: RequestError) -> dict[str, Any]:
    """Return the JSON that tells of a refusal: Cohere's shape below /v2, OpenAI's elsewhere."""
    if path.startswith("/v2/"):
        return {"message": str(refusal)}
    below_500 = _KINDS.get(refusal.status, "invalid_request_error")
    kind = below_500 if refusal.status < 500 else "server_error"
    return {"error": {"message": str(refusal), "type": kind, "code": refusal.code}}
