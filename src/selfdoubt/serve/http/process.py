"""A server process: it binds, serves, and on SIGTERM finishes what it has begun."""

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

#: How a server that others may reach is started.
_ADVICE = "give one with --api-key (or SELFDOUBT_API_KEY), or bind to this machine only with --host 127.0.0.1"
#: Seconds that connections get after all answers are given: pages keep theirs open for ever.
_LAST = 1


def bind_socket(host: str, port: int, *, keys: bool, advice: str = _ADVICE) -> socket.socket:
    """Take a port, before a large model loads.

    Args:
        host: A name or an address of this machine.
        port: 0 takes a free one.
        keys: Whether requests need a key; without, only this machine may connect.
        advice: What to do where others could.

    Raises:
        ConfigError: If there is no key and others could connect, or the port cannot be had.
    """
    if not 0 <= port <= 65535:  # the system would take what is left of it in 16 bits
        raise ConfigError(f"a port is a number from 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"{host!r}, port {port}, is no address of this machine: {error}") from None
    family, kind, protocol, _, address = found[0]
    if not keys and not all(_loopback(str(entry[4][0])) for entry in found):
        raise ConfigError(f"without a key anybody who reaches {host} could ask; {advice}")
    own = socket.socket(family, kind, protocol)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind(address)
    except OSError as error:
        own.close()
        why = "it is in use" if error.errno == errno.EADDRINUSE else f"{error.strerror}"
        raise ConfigError(
            f"port {port} on {host} cannot be had: {why}; choose another with --port, or 0 for any free one"
        ) from None
    own.setblocking(False)
    return own


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def format_url(own: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = own.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Drains at the first signal, and ends at once at the second.

    Args:
        config: For uvicorn.
        engine: Is closed: it finishes what it has taken.
        active: How many requests are not answered to their last byte.
        drain: Seconds for that.
        started: Called when requests are taken.
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
        self._engine, self._active, self._drain, self._begun = engine, active, drain, started
        self._signals = 0
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, and say so."""
        try:
            await super().startup(sockets)
        except OSError as error:  # somebody else was quicker while the model was loading
            message = f"nobody can listen on this port ({error.strerror}); choose another with --port"
            raise ConfigError(message) from None
        self._begun()

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """SIGTERM or SIGINT."""
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Looked at ten times a second."""
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
        while self._active() and time.monotonic() < until:  # what is answered still has to be sent
            await asyncio.sleep(0.02)


def run_server(
    app: Any,
    own: socket.socket,
    engine: EngineClient,
    *,
    drain: float,
    started: Callable[[], object],
    active: Callable[[], int] = lambda: 0,
    settings: ServerSettings | None = None,
) -> bool:
    """Serve until a signal comes; whether it could end in peace.

    Args:
        app: An ASGI app.
        own: From ``bind_socket``.
        engine: Has been started.
        drain: Seconds that running requests get at the end.
        started: Called when requests are taken.
        active: How many requests are not answered to their last byte, as far as anybody counts.
        settings: How many connections there may be, and for how long.
    """
    settings = settings or ServerSettings()
    protocol: Any = partial(GuardedConnection, guard=ConnectionGuard(settings))
    config = uvicorn.Config(
        app, log_config=None, log_level="critical", access_log=False, server_header=False, ws="none", lifespan="on",
        timeout_graceful_shutdown=_LAST, http=protocol, timeout_keep_alive=math.ceil(settings.idle_seconds),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )  # fmt: skip
    server = Server(config, engine, active, drain, started)
    server.run(sockets=[own])
    engine.close(0)
    return not server.force_exit
