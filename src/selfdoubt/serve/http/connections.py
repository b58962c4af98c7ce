"""A guard around uvicorn's protocol: limits on open connections, and on their time without a request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from selfdoubt.serve.http.auth import DISCARD_FACTOR
from selfdoubt.serve.http.settings import ServerSettings
from selfdoubt.serve.openai.errors import INVALID_REQUEST, SERVER_ERROR, RequestError

#: Longest head of a request, in bytes.
MAX_HEAD_BYTES = 65_536
#: Seconds after which a client that reads nothing of its answer is cut off.
STALLED_SECONDS = 120.0
_FULL = "too many connections are open; try again in a moment"
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}
_Protocol: Any = AutoHTTPProtocol  # uvicorn takes httptools, or else h11


class ConnectionGuard:
    """The open connections of a server, and those of them without a request in progress.

    Args:
        settings: Limits on connections.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.open: set[GuardedConnection] = set()
        self.without_request: dict[GuardedConnection, None] = {}  # the longest without a request first

    def admit(self, newcomer: GuardedConnection) -> bool:
        """Count a connection; return whether it may stay.

        If there are too many, the one that has waited longest without a request makes room.
        """
        self.open.add(newcomer)
        if len(self.open) <= self.settings.connections:
            return True
        oldest = next(iter(self.without_request), None)
        if oldest is None:
            return False
        oldest.make_room()
        return True

    def forget(self, connection: GuardedConnection) -> None:
        """Stop counting a connection."""
        self.open.discard(connection)
        self.without_request.pop(connection, None)


class GuardedConnection(_Protocol):  # type: ignore[misc]
    """A connection that is closed if its request does not come, or its answer is not read.

    Args:
        guard: Guard of the server.
        options: Options of uvicorn.
    """

    def __init__(self, *, guard: ConnectionGuard, **options: Any) -> None:
        super().__init__(**options)
        self._guard = guard
        self._head = 0  # bytes since there was a request in progress
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._left = False

    @property
    def _is_busy(self) -> bool:
        """True if a request is in progress: its head is here, and its answer is not complete."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        return is_answering or bool(getattr(self, "pipeline", ()))

    def connection_made(self, transport: asyncio.Transport) -> None:
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        if self._guard.admit(self):
            self._wait(self._guard.settings.header_seconds)
        else:
            self._refuse(503, _FULL, SERVER_ERROR, "too_many_connections")

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if self._left:
            return
        was_busy = self._is_busy
        super().data_received(data)
        if self._is_busy:
            self._go_on()
        elif not was_busy and not self.transport.is_closing():
            if not self._head and self.cycle is not None:  # a further request has begun
                self._wait(self._guard.settings.header_seconds)
            self._head += len(data)
            # The rest of a body, unread because its request was refused, is dropped, and may be longer.
            rest = self.cycle is not None and self.cycle.more_body
            if self._head > MAX_HEAD_BYTES + rest * DISCARD_FACTOR * self._guard.settings.body_bytes:
                self._refuse(
                    431, f"the head of the request is longer than {MAX_HEAD_BYTES} bytes", code="head_too_large"
                )

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        if not self._is_busy and not self.transport.is_closing():
            self._head = 0
            self._wait(self._guard.settings.idle_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._go_on()
        self._stop_stall()
        self._guard.forget(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See ``asyncio.Protocol``."""
        super().pause_writing()
        self._stop_stall()
        self._stall = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """See ``asyncio.Protocol``."""
        super().resume_writing()
        self._stop_stall()

    def make_room(self) -> None:
        """Close a connection without a request in progress, because there are too many; half a request gets a reply."""
        if self._head:
            self._refuse(503, _FULL, SERVER_ERROR, "too_many_connections")
        else:
            self._close()

    def leave(self) -> None:
        """Close a connection without a request in progress, because its time is over; half a request gets a reply."""
        if self._head:
            seconds = self._guard.settings.header_seconds
            self._refuse(408, f"the head of the request was not complete within {seconds:g} s", code="head_timeout")
        else:
            self._close()

    def _wait(self, seconds: float) -> None:
        self._go_on()
        self._guard.without_request[self] = None
        self._timer = self.loop.call_later(seconds, self.leave)

    def _go_on(self) -> None:
        self._guard.without_request.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _refuse(self, status: int, message: str, kind: str = INVALID_REQUEST, code: str | None = None) -> None:
        body = json.dumps(RequestError(status, message, kind, code=code).body).encode()
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._close()

    def _close(self) -> None:
        self._left = True
        self._guard.forget(self)
        self._go_on()
        self.transport.close()
