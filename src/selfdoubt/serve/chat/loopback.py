"""Serves an app to this machine only, until somebody ends it. Imports uvicorn at its top: import it lazily."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from selfdoubt.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this machine; port 0 takes a free one.

    Raises:
        ConfigError: If the host can be reached from other machines, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"there is no address {host!r} with port {port}: {error}") from None
    family, kind, protocol, _, address = found[0]
    if not all(ipaddress.ip_address(str(a[4][0]).partition("%")[0]).is_loopback for a in found):
        raise ConfigError(
            f"{host} can be reached from other machines, and the chat asks nobody for a key: use 127.0.0.1, or "
            "`selfdoubt serve --ui --api-key KEY` to serve others"
        )
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"port {port} on {host} cannot be had ({error.strerror}); end what uses it, or give --port 0 for a free one"
        ) from None
    return made


def serve(app: Any, place: socket.socket, *, begun: Callable[[], object] = lambda: None) -> None:
    """Answer until SIGINT or SIGTERM, then return; a second SIGINT does not wait for open connections.

    Args:
        app: An ASGI app.
        place: From ``listen``.
        begun: Called when it answers.
    """
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1, lifespan="on")
    )

    def end(*_: object) -> None:
        server.should_exit = True

    # While it runs, uvicorn listens to signals itself; when it has ended it raises them again, for whoever was there
    # before it: that is ``end``, which changes nothing then.
    before = {s: signal.signal(s, end) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        begun()
        server.run(sockets=[place])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        place.close()
