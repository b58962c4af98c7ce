"""Replicas: several engines, on one machine or many, by Ray Serve.

``replicas`` has ``Replicas``, the ``EngineClient`` of all of them; ``cluster`` starts them and serves HTTP. Both need
the extra ``ray``; import them where they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

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

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
