"""Search: `POST /search`, `GET /index` and `GET /images/{id}`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from puma_jax.data.mbeir import Modality
from puma_jax.embedder import RawItem
from puma_jax.search.index import Hit, Index
from puma_jax.service.openapi import json_body
from puma_jax.service.pictures import (
    check_image,
    document_image,
    image_from_base64,
    image_from_url,
)
from puma_jax.service.request_errors import RequestError
from puma_jax.service.requests import Body, in_thread_if, parse, parse_form, within
from puma_jax.service.state import Service
from puma_jax.service.vectors import shortened
from puma_jax.typing import Float, ndarray

_FEWEST_FOUND = 16


class SearchRequest(Body):
    """A query: a text, an image, both, or a document whose like is wanted."""

    text: str | None = None
    """Words that describe what to find, or that go with the image."""
    image: str | None = None
    """data: URL, or base64 alone. A multipart form has the file itself."""
    id: str | None = None
    """Id of a document; those most like it are found. In place of text and image."""
    instruction: str | None = None
    """Instruction put before the text; that of the service by default, none if empty."""
    k: int = Field(default=24, ge=1)
    """Documents to return."""
    modality: Modality | None = None
    """Only documents of this modality."""
    filter: str | None = None
    """Expression over the further fields of documents, such as `price < 20`."""


def _item(body: SearchRequest, file: bytes | None, service: Service) -> RawItem:
    """Return the item of a query; its image is in the body, or a file of a form."""
    item: dict[str, Any] = {}
    if body.text and body.text.strip():
        item["text"] = body.text
    if file is not None:
        item["image"] = check_image(file, service.settings)
    elif body.image is not None:
        is_url = ":" in body.image[:12]
        read = image_from_url if is_url else image_from_base64
        item["image"] = read(body.image, service.settings)
    return item


def _shown(hit: Hit) -> dict[str, Any]:
    """Return a document that was found as the answer shows it; paths of files are not told."""
    document = hit.document
    has_image = document.image is not None
    return {
        "id": document.id,
        "score": hit.score,
        "modality": document.modality,
        "text": document.text,
        "image": f"/images/{quote(document.id, safe='')}" if has_image else None,
        "fields": dict(document.fields),
    }


class Searcher:
    """Answers queries from an index."""

    def __init__(self, service: Service, index: Index):
        """Search an index with the model of a service."""
        self.service, self.index = service, index

    async def search(self, body: SearchRequest, file: bytes | None) -> JSONResponse:
        """Return the documents that a query finds, and how long it took."""
        start = time.perf_counter()
        vectors, instruction, warnings = await self._embedded(body, file)
        encoded = time.perf_counter()
        loop = asyncio.get_running_loop()
        hits = await loop.run_in_executor(self.service.searchers, self._find, vectors, body)
        searched = time.perf_counter()
        self.service.metrics.search_seconds.observe(searched - encoded)
        return JSONResponse(
            {
                "hits": [_shown(hit) for hit in hits],
                "instruction": instruction,
                "warnings": warnings,
                "took_ms": {
                    "encode": round(1000 * (encoded - start), 2),
                    "search": round(1000 * (searched - encoded), 2),
                },
            }
        )

    async def _embedded(
        self, body: SearchRequest, file: bytes | None
    ) -> tuple[Float[ndarray, "1 width"], str | None, list[str]]:
        """Return the vector of a query, the instruction that it has, and what is to be said."""
        service, settings = self.service, self.service.settings
        if body.k > settings.max_k:
            raise RequestError(
                400, "invalid_request", f"k is {body.k}, expected 1 to {settings.max_k}"
            )
        given = settings.instruction if body.instruction is None else body.instruction
        instruction = given or None
        service.check_texts([body.text, instruction, body.filter])
        has_image = file is not None or body.image is not None
        item = await in_thread_if(has_image, _item, body, file, service)
        if body.id is not None:
            if item:
                raise RequestError(
                    400, "invalid_request", "a query has an id, or a text and an image"
                )
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(service.searchers, self._vector_of, body.id)
            return found, None, []
        if not item:
            raise RequestError(
                400, "invalid_request", "the query is empty: expected a text, an image, or an id"
            )
        encoded = await service.batcher.encode([(item, instruction)], truncate=True)
        limit = service.embedder.config.prompt.max_text_tokens
        said = f"the text was truncated to the {limit} tokens that the model reads"
        vectors = shortened(encoded.vectors, self.index.width)
        return vectors, instruction, [said] if encoded.truncated else []

    def _find(self, vectors: Float[ndarray, "1 width"], body: SearchRequest) -> list[Hit]:
        """Return the hits of a query; the document whose like is wanted is not among them."""
        wanted = body.k + (body.id is not None)
        hits = self.index.search(
            vectors, _asked_for(wanted), modality=body.modality, filter=body.filter or None
        )[0]
        return [hit for hit in hits if hit.document.id != body.id][: body.k]

    def _vector_of(self, identifier: str) -> Float[ndarray, "1 width"]:
        if self.index.documents([identifier])[0] is None:
            raise _not_found(identifier)
        return self.index.vectors([identifier])

    def image(self, identifier: str, width: int | None) -> tuple[bytes, str]:
        """Return the image of a document and its media type.

        Raises:
            RequestError: The index has no such document, or it has no image that can be read.
        """
        document = self.index.documents([identifier])[0]
        if document is None or document.image is None:
            raise _not_found(identifier)
        return document_image(Path(document.image), width)


def warm_up(index: Index, max_k: int) -> None:
    """Search for every number of documents that an index is asked for, so that it compiles.

    Raises:
        SearchError: The index cannot be searched.
    """
    query = np.eye(1, index.width, dtype=np.float32)
    asked = _FEWEST_FOUND
    while asked <= _asked_for(max_k + 1):
        index.search(query, asked)
        asked *= 2


def _asked_for(k: int) -> int:
    """Return a power of two from k on, so that few programs serve all numbers of documents."""
    return max(_FEWEST_FOUND, 1 << (k - 1).bit_length())


def _not_found(identifier: str) -> RequestError:
    return RequestError(404, "not_found", f'the index has nothing with the id "{identifier[:200]}"')


def routes(service: Service) -> APIRouter:
    """Return the routes of the search; without an index they say that there is none."""
    router = APIRouter(tags=["Search"])
    searcher = Searcher(service, service.index) if service.index is not None else None

    def required() -> Searcher:
        if searcher is None:
            raise RequestError(404, "no_index", "the service has no index: start it with --uri")
        return searcher

    @router.post("/search", openapi_extra=json_body(SearchRequest))
    async def search(request: Request) -> JSONResponse:
        """Find documents by text, image, both, or by what is like a document of the index.

        The body is JSON, or a multipart form with the same fields and the image as a file.
        """
        found = required()
        limit = service.settings.request_seconds
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with service.bodies.read(request, "multipart/form-data") as body:
                fields, file = await parse_form(body, request, SearchRequest)
                return await within(limit, request, found.search(fields, file))
        async with service.bodies.read(request, "application/json") as body:
            parsed = await parse(body, SearchRequest)
            return await within(limit, request, found.search(parsed, None))

    @router.get("/index")
    async def about() -> dict[str, Any]:
        """Return what a client should know of the index before it searches."""
        found = required()
        return {
            "documents": await asyncio.to_thread(len, found.index),
            "model": service.name,
            "width": found.index.width,
            "instruction": service.settings.instruction,
            "max_k": service.settings.max_k,
        }

    @router.get("/images/{identifier:path}")
    async def image(
        identifier: str, request: Request, width: int | None = Query(None, ge=1, le=4096)
    ) -> Response:
        """Return the image of a document, or a thumbnail of about this width."""
        found = required()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(service.searchers, found.image, identifier, width)
        data, media_type = await within(service.settings.request_seconds, request, work)
        return Response(
            data,
            media_type=media_type,
            headers={"Cache-Control": "private, max-age=300", "Content-Disposition": "inline"},
        )

    return router
