"""Builds the OpenAPI schema of the server's replies, its errors and streams included."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from selfdoubt.serve.openai import responses

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": responses.ErrorReply} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
}
_REF = "#/components/schemas/{model}"


def describe_replies(whole: type[BaseModel], chunk: type[BaseModel] | None = None) -> dict[int | str, dict[str, Any]]:
    """Return the schema of an endpoint's replies: JSON, with ``chunk`` also events that hold it, and errors."""
    if chunk is None:
        return {**_ERRORS, 200: {"model": whole}}
    kinds = [{"$ref": _REF.format(model=model.__name__)} for model in (chunk, responses.ErrorReply)]
    data = {"contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, data]}},
    }
    return {**_ERRORS, 200: {"model": whole, "content": {"text/event-stream": {"itemSchema": event}}}}


def build_schema(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """Return the schema of an app: wrong input is 400, and with ``keys`` a request needs one."""
    if app.openapi_schema is None:
        openapi = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in openapi["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        components = openapi["components"]
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        events = models_json_schema(
            [(responses.ChatChunk, "validation"), (responses.TextChunk, "validation")], ref_template=_REF
        )
        components["schemas"] |= events[1]["$defs"]
        if keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for name, path in openapi["paths"].items():
                for operation in path.values() if name not in ("/healthz", "/readyz") else ():
                    operation["security"] = [{"key": []}]
        app.openapi_schema = openapi
    return app.openapi_schema
