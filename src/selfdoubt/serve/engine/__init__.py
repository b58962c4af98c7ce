"""The engine: one thread owns the model, batches requests and schedules their prefills.

It takes ``GenerationRequest`` and gives a ``RequestHandle`` per request, through which its answers come back. It knows
nothing of HTTP; servers, pages and Python callers use it through ``EngineClient``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.serve.engine.client import EngineClient
    from selfdoubt.serve.engine.engine import Engine
    from selfdoubt.serve.engine.limits import Limits
    from selfdoubt.serve.engine.request import GenerationRequest, RequestHandle
    from selfdoubt.serve.engine.stats import EngineStats

_HOMES = {
    "Engine": "engine",
    "EngineClient": "client",
    "EngineStats": "stats",
    "GenerationRequest": "request",
    "Limits": "limits",
    "RequestHandle": "request",
}
__all__ = ["Engine", "EngineClient", "EngineStats", "GenerationRequest", "Limits", "RequestHandle"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: the command line reads limits before anything heavy is imported."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
