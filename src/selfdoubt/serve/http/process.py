"""Runs a server process: binds a port, serves, and drains running requests on SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import math
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from selfdoubt.errors import ConfigError
from selfdoubt.serve.engine.client import EngineClient
from selfdoubt.serve.http.connections import MAX_HEAD_BYTES, ConnectionGuard, GuardedConnection
from selfdoubt.serve.http.settings import ServerSettings

#: Advice to start a server that others may reach.
_ADVICE = "give one with --api-key (or SELFDOUBT_API_KEY), or bind to this machine only with --host 127.0.0.1"
#: Seconds until connections are closed after all answers were sent: pages keep theirs open for ever.
_LAST = 1


def bind_socket(host: str, port: int, *, keys: bool, advice: str = _ADVICE) -> socket.socket:
    """Bind a port, before a large model loads.

    Args:
        host: A name or an address of this machine.
        port: 0 takes a free one.
        keys: True if requests need a key; without, only this machine may connect.
        advice: Repair to name in the error if others could connect.

    Raises:
        ConfigError: If others could connect and requests need no key, or the port cannot be bound.
    """
    if not 0 <= port <= 65535:  # the system would take the port modulo 65,536
        raise ConfigError(f"a port is a number from 0 to 65535, got {port}")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"{host!r}, port {port}, is not an address of this machine: {error}") from None
    family, kind, protocol, _, address = addresses[0]
    if not keys and not all(_is_loopback(str(entry[4][0])) for entry in addresses):
        raise ConfigError(f"without a key any client that reaches {host} could send requests; {advice}")
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        why = "address already in use" if error.errno == errno.EADDRINUSE else f"{error.strerror}"
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise ConfigError(f"Cannot bind {place}: {why}. Try --port 0.") from None
    listener.setblocking(False)
    return listener


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def format_url(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server that drains at the first signal, and ends at once at the second.

    Args:
        config: Configuration of uvicorn.
        engine: The engine, which is closed at the end: it finishes the requests that it has accepted.
        active: Function that returns the number of requests that are not answered to their last byte.
        drain: Seconds that running requests get to finish and to be sent.
        started: Function to call when requests are accepted.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: EngineClient,
        active: Callable[[], int],
        drain: float,
        started: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._engine, self._active, self._drain, self._call_started = engine, active, drain, started
        self._signals = 0
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and call ``started``."""
        try:
            await super().startup(sockets)
        except OSError as error:  # another process was quicker while the model was loading
            raise ConfigError(f"Cannot listen on this port: {error.strerror}. Try --port 0.") from None
        self._call_started()

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """Handle SIGTERM or SIGINT."""
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Check for the end; called ten times a second."""
        if self._signals and self._draining is None:
            self._draining = asyncio.create_task(self._finish())
        drained = self._draining is not None and self._draining.done()
        return await super().on_tick(counter) or drained

    async def _finish(self) -> None:
        until = time.monotonic() + self._drain
        closing = threading.Thread(target=self._engine.close, args=(self._drain,), name="close", daemon=True)
        closing.start()
        while closing.is_alive() and time.monotonic() < until + 1:
            await asyncio.sleep(0.02)
        while self._active() and time.monotonic() < until:  # the answers still have to be sent
            await asyncio.sleep(0.02)


def run_server(
    app: Any,
    listener: socket.socket,
    engine: EngineClient,
    *,
    drain: float,
    started: Callable[[], object],
    active: Callable[[], int] = lambda: 0,
    settings: ServerSettings | None = None,
) -> bool:
    """Serve until a signal comes; return False if a second one cut it off.

    Args:
        app: An ASGI app.
        listener: Bound socket, from ``bind_socket``.
        engine: A started engine.
        drain: Seconds that running requests get at the end.
        started: Function to call when requests are accepted.
        active: Function that returns the number of requests that are not answered to their last byte.
        settings: Limits on connections.
    """
    settings = settings or ServerSettings()
    protocol: Any = partial(GuardedConnection, guard=ConnectionGuard(settings))
    config = uvicorn.Config(
        app, log_config=None, log_level="critical", access_log=False, server_header=False, ws="none", lifespan="on",
        timeout_graceful_shutdown=_LAST, http=protocol, timeout_keep_alive=math.ceil(settings.idle_seconds),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )  # fmt: skip
    server = Server(config, engine, active, drain, started)
    server.run(sockets=[listener])
    engine.close(0)
    return not server.force_exit
