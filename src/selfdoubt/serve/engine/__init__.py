"""The engine: one thread owns the model, batches requests and schedules their prefills.

It takes ``GenerationRequest`` and gives a ``RequestHandle`` per request, through which its answers come back. It knows
nothing of HTTP; servers, pages and Python callers use it through ``EngineClient``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

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

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
