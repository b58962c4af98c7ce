"""The server on Ray: one front, which speaks HTTP behind Ray's proxy, and as many engines as are asked for.

This file needs the extra ``ray``; import it where it is used.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from selfdoubt.errors import ConfigError, EngineError, require
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.http.settings import Settings
from selfdoubt.serve.ray.replicas import ENGINE, FRONT, NAME, Replica, Replicas

ray = require("ray", "ray")
serve = require("ray.serve", "ray")


@dataclass(frozen=True)
class Cluster:
    """Where and how replicas run.

    Args:
        replicas: How many.
        address: Of a Ray cluster; None starts one on this machine, "auto" takes the one that it is part of.
        gpus: What each replica needs; a share of one is allowed.
        cpus: The same.

    Raises:
        ConfigError: If a number is out of range.
    """

    replicas: int = 2
    address: str | None = None
    gpus: float = 0.0
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"there must be at least 1 replica, got {self.replicas}")
        if min(self.gpus, self.cpus) < 0:
            raise ConfigError(f"a replica cannot take {self.gpus} GPUs and {self.cpus} CPUs")


def application(
    load: Callable[[], RiskAwareLM], limits: Limits, settings: Settings, cluster: Cluster, drain: float, *, ui: bool
) -> Any:
    """What Ray Serve runs."""
    engine = serve.deployment(
        Replica,
        name=ENGINE,
        num_replicas=cluster.replicas,
        max_ongoing_requests=2 * (limits.queue + limits.batch),  # an engine itself says when it is full
        max_queued_requests=limits.queue,
        max_constructor_retry_count=3,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=drain,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
    ).bind(load, limits)

    def front() -> Any:
        from selfdoubt.serve.engine import memory
        from selfdoubt.serve.http.app import create_app
        from selfdoubt.serve.http.metrics import Metrics

        memory.bound_process()
        desk = Replicas(serve.get_deployment_handle(ENGINE, app_name=NAME), limits, Metrics())
        desk.start()
        app = create_app(desk, settings)
        if ui:
            from selfdoubt.serve.chat import mount

            app = mount(app, desk, title=settings.name, model=settings.name)
        return app

    return serve.deployment(
        serve.ingress(front)(),
        name=FRONT,
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=drain,
        ray_actor_options={"num_cpus": 0},
    ).bind(engine)


def run(
    application: Any, cluster: Cluster, host: str, port: int, *, started: Callable[[], object], idle: float = 75.0
) -> None:
    """Serve until SIGTERM or SIGINT comes; running requests are finished.

    Args:
        application: From ``application``.
        cluster: Is joined, or started here.
        host: Where Ray's proxies listen, on every machine of the cluster.
        port: The same.
        started: Called when requests are taken.
        idle: Seconds that Ray's proxies keep a connection without a further request.

    Raises:
        EngineError: If no cluster answers, or the replicas do not start.
    """
    if cluster.address is not None and cluster.address != "auto":
        _reach(cluster.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On this machine the replicas that were asked for must fit, however few cores there are.
    own = {} if cluster.address else {"num_cpus": max(os.cpu_count() or 1, int(cluster.replicas * cluster.cpus + 1))}
    try:
        ray.init(
            address=cluster.address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            **own,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).partition(". ")[0]
        raise EngineError(f"no Ray cluster at {cluster.address or 'this machine'!r}: {why}") from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    up, done = False, threading.Event()

    def stop(_number: int, _frame: object) -> None:
        done.set()
        if not up:
            raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):  # not before: Ray has put handlers of its own there
        signal.signal(number, stop)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    try:
        _has_room(cluster)
        http = {"host": host, "port": port, "keep_alive_timeout_s": math.ceil(idle)}
        serve.start(proxy_location="EveryNode", http_options=http, logging_config=quiet)
        try:
            _deploy(application, quiet)
            up = True
            started()
            done.wait()
        finally:
            serve.delete(NAME)  # also what has only begun: on a cluster it would go on without this process
        if cluster.address is None:
            serve.shutdown()
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Nothing, if anybody listens at ``HOST:PORT``: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise EngineError(
            f"no Ray cluster at {address!r} ({error}); it looks like HOST:6379, as `ray start --head` says at its end"
        ) from None


def _deploy(application: Any, logs: dict[str, Any]) -> None:
    """Start the replicas; an error has the last line of what one of them said, or else what Ray says."""
    try:
        serve.run(application, name=NAME, route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        app = serve.status().applications.get(NAME)
        engine = None if app is None else app.deployments.get(ENGINE)
        said = "" if engine is None else engine.message.strip()
        why = said.splitlines()[-1].removeprefix("selfdoubt.errors.") if said else str(error)
        raise EngineError(f"the replicas do not start: {why}") from None


def _has_room(cluster: Cluster) -> None:
    """Say where replicas would wait for ever; a cluster that grows may still have room later."""
    has = ray.cluster_resources()
    needs = {"CPU": cluster.replicas * cluster.cpus, "GPU": cluster.replicas * cluster.gpus}
    lacks = [
        f"{needs[kind]:g} {kind}s and there are {has.get(kind, 0):g}"
        for kind in needs
        if has.get(kind, 0) < needs[kind]
    ]
    if not lacks:
        return
    line = f"{cluster.replicas} replicas need {' and '.join(lacks)}"
    if cluster.address is None:
        raise EngineError(f"{line}; ask for fewer, or for a smaller share of a GPU each (--replica-gpus 0.5)")
    print(f"selfdoubt: {line}; waiting until the cluster has grown", file=sys.stderr, flush=True)
