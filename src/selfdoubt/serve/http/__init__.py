"""The web application and its process: routes, streams, keys, limits on connections, and metrics.

``create_app`` makes the application of an engine, ``run_server`` the process around it; ``ServerSettings`` says how
they behave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

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

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
