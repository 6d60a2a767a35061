"""Cohere's embed API, version 2: `POST /v2/embed`, for texts, images, and both in one item."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from puma_jax.data.images import image_size
from puma_jax.data.raw_items import RawItem, images_of
from puma_jax.service.openai import Part, joined
from puma_jax.service.openapi import json_body
from puma_jax.service.pictures import image_from_url
from puma_jax.service.request_errors import RequestError
from puma_jax.service.requests import LARGE_ANSWER, Body, in_thread_if
from puma_jax.service.state import Service
from puma_jax.service.vectors import EmbeddingType, quantized, shortened


class Input(Body):
    """An item: texts, images, or both."""

    content: list[Part]


class EmbedRequest(Body):
    """Texts, images, or items that mix them."""

    model: str | None = None
    """Name of the model, as `GET /v1/models` tells it."""
    input_type: Literal["search_document", "search_query", "classification", "clustering", "image"]
    """"search_query" puts the service's instruction before every item, "search_document" that of
    the index; the others put none."""
    texts: list[str] | None = None
    """Items of text."""
    images: list[str] | None = None
    """Items of images: data: URLs with base64. The service fetches nothing."""
    inputs: list[Input] | None = None
    """Items that mix texts and images, each with a list `content` of parts."""
    embedding_types: list[EmbeddingType] | None = None
    """Types of the vectors; "float" by default."""
    output_dimension: int | None = None
    """First values of a vector to return, scaled to length 1 again. All by default."""
    truncate: Literal["NONE", "END"] = "END"
    """The treatment of texts that are too long: NONE refuses them, END keeps their beginning and
    says so in meta.warnings."""
    priority: int | None = None
    """Ignored: requests are served as they come."""


def _items(body: EmbedRequest, service: Service) -> list[RawItem]:
    """Return the items of a request."""
    given = [value for value in (body.texts, body.images, body.inputs) if value is not None]
    if len(given) != 1:
        raise RequestError(
            400, "invalid_request", f"expected one of texts, images and inputs, found {len(given)}"
        )
    service.check_items(len(given[0]))
    settings = service.settings
    items: list[RawItem] = [{"text": text} for text in body.texts or []]
    items += [{"image": image_from_url(url, settings)} for url in body.images or []]
    items += [joined(one.content, settings) for one in body.inputs or []]
    service.check_texts([item.get("text") for item in items])
    return items


def _about_images(items: list[RawItem]) -> list[dict[str, Any]]:
    """Return the size of every image, as Cohere's answers tell it."""
    sizes = [image_size(item["image"]) for item in items]
    return [
        {"width": width, "height": height, "format": "", "bit_depth": 24} for height, width in sizes
    ]


def routes(service: Service) -> APIRouter:
    """Return the routes of this API."""
    router = APIRouter(tags=["Cohere"])
    instructions = {
        "search_query": service.settings.instruction,
        "search_document": service.index.instruction if service.index is not None else None,
    }

    async def embed(body: EmbedRequest) -> JSONResponse:
        service.check_model(body.model)
        items = await in_thread_if(body.texts is None, _items, body, service)
        instruction = instructions.get(body.input_type)
        encoded = await service.batcher.encode(
            [(item, instruction) for item in items], truncate=body.truncate == "END"
        )

        def render() -> JSONResponse:
            vectors = shortened(encoded.vectors, body.output_dimension)
            kinds = body.embedding_types or ["float"]
            images = sum(len(images_of(item)) for item in items)
            meta: dict[str, Any] = {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": encoded.tokens, "images": images},
            }
            if encoded.truncated:
                which = ", ".join(str(number) for number in encoded.truncated)
                meta["warnings"] = [f"the texts of these items were truncated: {which}"]
            answer: dict[str, Any] = {
                "response_type": "embeddings_by_type",
                "id": str(uuid.uuid4()),
                "embeddings": {kind: quantized(vectors, kind) for kind in kinds},
                "texts": body.texts or [],
                "meta": meta,
            }
            if body.images is not None:
                answer["images"] = _about_images(items)
            return JSONResponse(answer)

        return await in_thread_if(encoded.vectors.size > LARGE_ANSWER, render)

    @router.post("/v2/embed", openapi_extra=json_body(EmbedRequest))
    async def embed_v2(request: Request) -> JSONResponse:
        """Return one vector for each text, image, or item that mixes them, in several types."""
        return await service.answer(request, EmbedRequest, embed)

    return router
