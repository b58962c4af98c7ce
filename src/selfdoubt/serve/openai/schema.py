"""The OpenAPI schema of the server, as it truly answers."""

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
    """What an endpoint answers: JSON, where ``chunk`` is given also events that hold it, and errors."""
    if chunk is None:
        return {**_ERRORS, 200: {"model": whole}}
    parts = [{"$ref": _REF.format(model=model.__name__)} for model in (chunk, responses.ErrorReply)]
    data = {"contentMediaType": "application/json", "contentSchema": {"anyOf": parts}}
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, data]}},
    }
    return {**_ERRORS, 200: {"model": whole, "content": {"text/event-stream": {"itemSchema": event}}}}


def build_schema(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """The schema: wrong input is 400, and with keys one is needed."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        parts = found["components"]
        for unused in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(unused, None)
        events = models_json_schema(
            [(responses.ChatChunk, "validation"), (responses.TextChunk, "validation")], ref_template=_REF
        )
        parts["schemas"] |= events[1]["$defs"]
        if keys:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for name, path in found["paths"].items():
                for operation in path.values() if name not in ("/healthz", "/readyz") else ():
                    operation["security"] = [{"key": []}]
        app.openapi_schema = found
    return app.openapi_schema
