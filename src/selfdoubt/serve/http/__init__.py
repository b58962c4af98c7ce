"""The web application and its process: routes, streams, keys, limits on connections, and metrics.

``create_app`` makes the application of an engine, ``run_server`` the process around it; ``ServerSettings`` says how
they behave.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.serve.http.app import create_app
    from selfdoubt.serve.http.metrics import Metrics
    from selfdoubt.serve.http.process import bind_socket, run_server
    from selfdoubt.serve.http.settings import ServerSettings

_HOMES = {
    "Metrics": "metrics",
    "ServerSettings": "settings",
    "bind_socket": "process",
    "create_app": "app",
    "run_server": "process",
}
__all__ = ["Metrics", "ServerSettings", "bind_socket", "create_app", "run_server"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: the command line reads settings before anything heavy is imported."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
