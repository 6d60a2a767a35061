"""The app: all routes of a service behind its gate."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from puma_jax import __version__
from puma_jax.service import cohere, openai, searching
from puma_jax.service.gate import Gate
from puma_jax.service.openapi import describe
from puma_jax.service.request_errors import RequestError
from puma_jax.service.state import Service

_PAGE = Path(__file__).with_name("page")
_ASSETS = {
    "style.css": "text/css",
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "view.js": "text/javascript",
    "docs.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


def create_app(service: Service, key: str | None = None) -> FastAPI:
    """Return the app of a service; it starts the service's threads, and ends them.

    Args:
        service: The model, the index and the settings.
        key: Key that clients must send; None for none.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(
        title="puma_jax",
        version=__version__,
        summary="Embeddings of texts and images, and search in an index of both",
        docs_url=None,  # theirs loads its scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(Gate, service=service, key=key)
    app.add_exception_handler(HTTPException, _raise_request_error)
    app.add_exception_handler(RequestValidationError, _raise_request_error)
    app.include_router(openai.routes(service))
    app.include_router(cohere.routes(service))
    app.include_router(searching.routes(service))
    app.include_router(_operations(service))
    app.include_router(_page())
    describe(app)
    return app


def _raise_request_error(request: Request, error: Exception) -> Response:
    """Turn what FastAPI and Starlette refuse by themselves into a refusal, which the gate answers.

    Raises:
        RequestError: Always.
    """
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        raise RequestError(
            error.status_code, codes.get(error.status_code, "invalid_request"), message,
            error.headers,
        )  # fmt: skip
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    raise RequestError(400, "invalid_request", f"{first['loc'][-1]}: {first['msg']}")


def _operations(service: Service) -> APIRouter:
    """Return the routes by which a service is watched."""
    router = APIRouter(tags=["Operation"])

    @router.get("/health")
    async def health() -> JSONResponse:
        """Tell whether the process works: 200, or 503 if it must be started again."""
        failed = service.batcher.failed
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Tell whether requests are served: 503 while programs compile, and while it stops."""
        if service.stopping:
            status = "stopping"
        elif service.batcher.failed:
            status = "failed"
        else:
            status = "ready" if service.batcher.ready.is_set() else "compiling"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Return counters and times, as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _page() -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @router.get("/docs")
    async def docs() -> FileResponse:
        return FileResponse(_PAGE / "docs.html", headers={"Cache-Control": "no-cache"})

    @router.get("/assets/{name}")
    async def asset(name: str) -> FileResponse:
        if name not in _ASSETS:
            raise HTTPException(404, "Not Found")
        headers = {"Cache-Control": "no-cache"}
        return FileResponse(_PAGE / name, media_type=_ASSETS[name], headers=headers)

    return router
