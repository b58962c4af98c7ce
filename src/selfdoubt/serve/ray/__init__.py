"""Replicas: several engines, on one machine or many, by Ray Serve.

``replicas`` has ``Replicas``, the ``EngineClient`` of all of them; ``cluster`` starts them and serves HTTP. Both need
the extra ``ray``; import them where they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.serve.ray.cluster import Cluster, build_application, run_cluster
    from selfdoubt.serve.ray.replicas import Replica, Replicas

_HOMES = {
    "Cluster": "cluster",
    "Replica": "replicas",
    "Replicas": "replicas",
    "build_application": "cluster",
    "run_cluster": "cluster",
}
__all__ = ["Cluster", "Replica", "Replicas", "build_application", "run_cluster"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
