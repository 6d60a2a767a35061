"""The description of the service in OpenAPI, which needs nothing from other hosts to be read."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

_REF = "#/components/schemas/{model}"


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return what a route tells OpenAPI of its body, which the route reads by itself."""
    schema = model.model_json_schema(ref_template=_REF)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> None:
    """Make the app's OpenAPI description whole: nested schemas move to where references look."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = generate()
            schemas = described.setdefault("components", {}).setdefault("schemas", {})
            for path in described["paths"].values():
                for operation in path.values():
                    content = operation.get("requestBody", {}).get("content", {})
                    for body in content.values():
                        schemas |= body["schema"].pop("$defs", {})
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
