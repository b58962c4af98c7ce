"""Runs the server on Ray: one HTTP front behind Ray's proxy, and several engines.

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

from selfdoubt.errors import ConfigError, EngineError
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.http.settings import ServerSettings
from selfdoubt.serve.ray.library import ray, ray_serve
from selfdoubt.serve.ray.replicas import APP_NAME, ENGINE_NAME, FRONT_NAME, Replica, Replicas


@dataclass(frozen=True)
class Cluster:
    """Settings of a Ray cluster: its address, the number of replicas, and the resources of each.

    Args:
        replicas: Number of replicas.
        address: Address of a Ray cluster; None starts one on this machine, "auto" takes the one that it is part of.
        gpus: GPUs that each replica needs; a share of one is allowed.
        cpus: CPUs that each replica needs.

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


def build_application(
    load: Callable[[], RiskAwareLM],
    limits: Limits,
    settings: ServerSettings,
    cluster: Cluster,
    drain: float,
    *,
    ui: bool,
) -> Any:
    """Return the application that Ray Serve runs."""
    engine = ray_serve.deployment(
        Replica,
        name=ENGINE_NAME,
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

        memory.bound_process_memory()
        engines = Replicas(ray_serve.get_deployment_handle(ENGINE_NAME, app_name=APP_NAME), limits, Metrics())
        engines.start()
        app = create_app(engines, settings)
        if ui:
            from selfdoubt.serve.chat import mount

            app = mount(app, engines, title=settings.name, model=settings.name)
        return app

    return ray_serve.deployment(
        ray_serve.ingress(front)(),
        name=FRONT_NAME,
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=drain,
        ray_actor_options={"num_cpus": 0},
    ).bind(engine)


def run_cluster(
    application: Any, cluster: Cluster, host: str, port: int, *, started: Callable[[], object], idle: float = 75.0
) -> None:
    """Serve until SIGTERM or SIGINT comes; running requests are finished.

    Args:
        application: Application from ``build_application``.
        cluster: The cluster, which is joined, or started here.
        host: Address on which Ray's proxies listen, on every machine of the cluster.
        port: Port on which they listen.
        started: Function to call when requests are accepted.
        idle: Seconds that Ray's proxies keep a connection without a further request.

    Raises:
        EngineError: If no cluster answers, or the proxies or the replicas do not start.
    """
    if cluster.address is not None and cluster.address != "auto":
        _check_address(cluster.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On this machine all replicas must fit, however few cores there are.
    cpus = max(os.cpu_count() or 1, int(cluster.replicas * cluster.cpus + 1))
    resources = {} if cluster.address else {"num_cpus": cpus}
    try:
        ray.init(
            address=cluster.address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            **resources,
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
        _check_room(cluster)
        http = {"host": host, "port": port, "keep_alive_timeout_s": math.ceil(idle)}
        start_proxies(http, quiet)
        try:
            _deploy(application, quiet)
            up = True
            started()
            done.wait()
        finally:
            ray_serve.delete(APP_NAME)  # also what has only begun: on a cluster it would go on without this process
        if cluster.address is None:
            ray_serve.shutdown()
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Check that a process listens at ``HOST:PORT``: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise EngineError(
            f"no Ray cluster at {address!r} ({error}); it looks like HOST:6379, as `ray start --head` says at its end"
        ) from None


def start_proxies(http: dict[str, Any], logs: dict[str, Any]) -> None:
    """Start the proxies, which take requests on each machine; Ray waits a minute for them.

    Raises:
        EngineError: If they do not start.
    """
    try:
        ray_serve.start(proxy_location="EveryNode", http_options=http, logging_config=logs)
    except (ray.exceptions.RayError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(
            f"Ray's proxies do not start ({why}); try again when the machines are less busy, or another --port"
        ) from None


def _deploy(application: Any, logs: dict[str, Any]) -> None:
    """Start the replicas; an error has the last line of a replica's message, or else Ray's own."""
    try:
        ray_serve.run(application, name=APP_NAME, route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        app = ray_serve.status().applications.get(APP_NAME)
        engine = None if app is None else app.deployments.get(ENGINE_NAME)
        message = "" if engine is None else engine.message.strip()
        why = message.splitlines()[-1].removeprefix("selfdoubt.errors.") if message else str(error)
        raise EngineError(f"the replicas do not start: {why}") from None


def _check_room(cluster: Cluster) -> None:
    """Report replicas that would wait for ever; a cluster that grows may still have room later."""
    has = ray.cluster_resources()
    needs = {"CPU": cluster.replicas * cluster.cpus, "GPU": cluster.replicas * cluster.gpus}
    lacks = [
        f"{needs[kind]:g} {kind}s and there are {has.get(kind, 0):g}"
        for kind in needs
        if has.get(kind, 0) < needs[kind]
    ]
    if not lacks:
        return
    need = f"{cluster.replicas} replicas need {' and '.join(lacks)}"
    if cluster.address is None:
        raise EngineError(f"{need}; ask for fewer, or for a smaller share of a GPU each (--replica-gpus 0.5)")
    print(f"selfdoubt: {need}; waiting until the cluster has grown", file=sys.stderr, flush=True)
