"""OpenAI's API as data: requests, replies, errors and the schema, with a risk next to every token.

``requests`` and ``responses`` describe the bodies, ``params`` turns a request into ``GenerationParams``, and
``format`` turns answers into replies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.serve.openai.errors import RequestError
    from selfdoubt.serve.openai.format import ResponseFormatter
    from selfdoubt.serve.openai.params import GenerationParams, build_params
    from selfdoubt.serve.openai.requests import ChatRequest, CompletionRequest, ScoreRequest

_HOMES = {
    "ChatRequest": "requests",
    "CompletionRequest": "requests",
    "GenerationParams": "params",
    "RequestError": "errors",
    "ResponseFormatter": "format",
    "ScoreRequest": "requests",
    "build_params": "params",
}
__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "GenerationParams",
    "RequestError",
    "ResponseFormatter",
    "ScoreRequest",
    "build_params",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
