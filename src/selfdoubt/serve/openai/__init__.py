"""OpenAI's API as data: requests, replies, errors and the schema, with a risk next to every token.

``requests`` and ``responses`` describe the bodies, ``params`` turns a request into ``GenerationParams``, and
``format`` turns answers into replies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

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

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
