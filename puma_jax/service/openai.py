"""OpenAI's embeddings API: `POST /v1/embeddings` and `GET /v1/models`.

Images come in vLLM's form, as `messages` of a chat with image_url parts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from puma_jax.embedder import RawItem
from puma_jax.service.openapi import json_body
from puma_jax.service.pictures import image_from_url
from puma_jax.service.request_errors import RequestError
from puma_jax.service.requests import LARGE_ANSWER, Body, in_thread_if
from puma_jax.service.settings import ServiceConfig
from puma_jax.service.state import Service
from puma_jax.service.vectors import base64_of, shortened


class ImageUrl(Body):
    """The URL of an image."""

    url: str
    """data: URL with base64. The service fetches nothing."""
    detail: str | None = None
    """Ignored: the model's own limits decide the size of an image."""


class TextPart(Body):
    """A text among the parts of an item."""

    type: Literal["text"]
    text: str


class ImagePart(Body):
    """An image among the parts of an item."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """A message of the chat that holds an item."""

    role: Literal["system", "user"]
    """The user's message is the item; a system message is its instruction."""
    content: str | list[Part]


class EmbeddingsRequest(Body):
    """Texts, or one item in the form of a chat."""

    model: str | None = None
    """Name of the model, as `GET /v1/models` tells it."""
    input: str | list[str] | list[int] | list[list[int]] | None = None
    """A text or a list of texts. Token ids are refused: they leave no room for the prompt."""
    messages: list[Message] | None = None
    """One item, with any number of images, in vLLM's form; in place of `input`."""
    instruction: str | None = None
    """Instruction of queries, put before the text of every item. None for documents."""
    encoding_format: Literal["float", "base64"] = "float"
    """Whether vectors are lists of numbers, or little-endian float32 bytes in base64."""
    dimensions: int | None = None
    """First values of a vector to return, scaled to length 1 again. All by default."""
    user: str | None = None
    """Ignored."""


def joined(parts: list[Part], settings: ServiceConfig) -> RawItem:
    """Return the item of a list of parts: its texts, line by line, and its images.

    Raises:
        ImageError: An image cannot be read.
    """
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    item: dict[str, Any] = {"text": "\n".join(texts)} if texts else {}
    if urls:
        item["image"] = [image_from_url(url, settings) for url in urls]
    return item


def _from_chat(body: EmbeddingsRequest, settings: ServiceConfig) -> tuple[RawItem, str | None]:
    """Return the item of a chat, and its instruction."""
    messages = body.messages or []
    system = [message for message in messages if message.role == "system"]
    user = [message for message in messages if message.role == "user"]
    if len(user) != 1 or len(system) > (body.instruction is None):
        raise RequestError(
            400,
            "invalid_request",
            f"messages holds {len(user)} of the user and {len(system)} of the system, expected 1 "
            "of the user, and 1 of the system at most, in place of instruction",
        )
    item, instruction = (
        {"text": message.content}
        if isinstance(message.content, str)
        else joined(message.content, settings)
        for message in (user[0], *(system or [Message(role="system", content="")]))
    )
    if "image" in instruction:
        raise RequestError(
            400, "invalid_request", "the system's message has an image, expected a text"
        )
    return item, instruction.get("text") or body.instruction


def _items(body: EmbeddingsRequest, service: Service) -> list[tuple[RawItem, str | None]]:
    """Return the items of a request with their instructions."""
    if (body.input is None) == (body.messages is None):
        raise RequestError(400, "invalid_request", "expected either input or messages")
    if body.messages is not None:
        items = [_from_chat(body, service.settings)]
    else:
        texts = [body.input] if isinstance(body.input, str) else body.input or []
        if any(not isinstance(text, str) for text in texts):
            raise RequestError(
                400,
                "token_ids_not_supported",
                "input holds token ids, expected texts: an item is a text in the model's prompt",
            )
        items = [({"text": text}, body.instruction) for text in texts]
    service.check_items(len(items))
    service.check_texts([text for item, said in items for text in (item.get("text"), said)])
    return items


def routes(service: Service) -> APIRouter:
    """Return the routes of this API."""
    router = APIRouter(tags=["OpenAI"])

    async def embed(body: EmbeddingsRequest) -> JSONResponse:
        service.check_model(body.model)
        items = await in_thread_if(body.messages is not None, _items, body, service)
        # As with OpenAI, a text that the model cannot read whole is an error.
        encoded = await service.batcher.encode(items, truncate=False)

        def render() -> JSONResponse:
            vectors = shortened(encoded.vectors, body.dimensions)
            return JSONResponse(
                {
                    "object": "list",
                    "data": [
                        {
                            "object": "embedding",
                            "index": number,
                            "embedding": base64_of(vector)
                            if body.encoding_format == "base64"
                            else vector.tolist(),
                        }
                        for number, vector in enumerate(vectors)
                    ],
                    "model": service.name,
                    "usage": {"prompt_tokens": encoded.tokens, "total_tokens": encoded.tokens},
                }
            )

        return await in_thread_if(encoded.vectors.size > LARGE_ANSWER, render)

    @router.post("/v1/embeddings", openapi_extra=json_body(EmbeddingsRequest))
    async def embeddings(request: Request) -> JSONResponse:
        """Return one vector for each text, or for one item with an image."""
        return await service.answer(request, EmbeddingsRequest, embed)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Return the name of the model."""
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "puma_jax"}
        return {"object": "list", "data": [model]}

    return router
