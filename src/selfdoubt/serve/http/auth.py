"""Access to the application: keys, hosts and bodies are checked before it, in plain ASGI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from typing import Any, Protocol, runtime_checkable

from selfdoubt.serve.http.asgi import ASGIMessage, Receive, Send
from selfdoubt.serve.http.body import check_body
from selfdoubt.serve.http.settings import ServerSettings
from selfdoubt.serve.openai.errors import INVALID_REQUEST, RequestError, shorten, to_request_error

log = logging.getLogger("selfdoubt.serve")

#: Open to clients without a key: the state of the server, and nothing else.
OPEN_PATHS = ("/healthz", "/readyz")
#: For programs, which send the key as a bearer; a browser is asked for a password elsewhere.
API_PATHS = ("/v1/", "/metrics", "/openapi.json")
#: Seconds in which a body must arrive.
BODY_SECONDS = 30.0
#: A body that is too long is read on, and dropped, up to this many times the limit, so that the client hears why.
DISCARD_FACTOR = 16
#: A body of this many bytes is checked in a thread.
_LONG = 1 << 16


@runtime_checkable
class RequestStats(Protocol):
    """Receiver of requests and replies, to count them."""

    def record_arrival(self, path: str) -> None:
        """Count a request that has arrived."""

    def record_reply(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered, to its last byte."""


class AccessMiddleware:
    """A middleware that checks keys, hosts and bodies; the application sees only requests that pass.

    Args:
        app: The application.
        settings: Keys, hosts and limits.
        metrics: Counts requests.
    """

    def __init__(self, app: Any, settings: ServerSettings, metrics: RequestStats) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.keys]
        self._hosts = {"localhost", *(host.lower() for host in settings.hosts)}

    async def __call__(self, scope: ASGIMessage, receive: Receive, send: Send) -> None:
        """Check a request and pass it on; see ASGI."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, started = time.monotonic(), 499, False

        async def sending(message: ASGIMessage) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        self.metrics.record_arrival(scope["path"])
        try:
            try:
                scope["client_id"] = self._check_client(scope)
                receive = await self._check_body(scope, receive)
            except RequestError as error:
                await _refuse(sending, error)
            except _DisconnectedError:
                return
            else:
                await self.app(scope, receive, sending)
        except Exception as error:
            log.exception("%s %r failed", scope["method"], shorten(scope["path"]))
            if started:
                raise
            await _refuse(sending, to_request_error(error))
        finally:
            took = time.monotonic() - began
            self.metrics.record_reply(scope["path"], status, took)
            if self.settings.log_requests:
                peer = (scope.get("client") or ("-",))[0]
                log.info("%s %s %r %s %.3fs", peer, scope["method"], shorten(scope["path"]), status, took)

    def _check_client(self, scope: ASGIMessage) -> str:
        """Return the client of a request: those of one key, or of one address, take turns with others."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        peer = str((scope.get("client") or ("",))[0])
        origin = headers.get(b"origin")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin is not None:
            is_same_host = origin.partition("://")[2].lower() == headers.get(b"host", "").lower()
            if not is_same_host and not {"*", origin} & set(self.settings.origins):
                raise RequestError(403, "this web page may not ask here; see --cors", code="origin_not_allowed")
        if not self._digests:
            if not self._is_addressed(headers.get(b"host", "")):
                raise RequestError(403, "this server has no such Host; see --allow-host", code="host_not_allowed")
            return peer
        if scope["path"] in OPEN_PATHS:
            return peer
        key = _read_key(headers.get(b"authorization", ""), basic=not scope["path"].startswith(API_PATHS))
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        known = [hmac.compare_digest(digest, other) for other in self._digests]  # all of them, in constant time
        if not any(known):
            raise self._refuse_key(scope["path"], given=bool(key))
        return digest.hex()[:16]

    def _is_addressed(self, host: str) -> bool:
        """Return whether a Host names this machine: a web page elsewhere may let its own name point here."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        name = name.strip("[]").lower()
        if name in self._hosts:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _refuse_key(self, path: str, *, given: bool) -> RequestError:
        message = "Incorrect API key provided" if given else "You didn't provide an API key"
        scheme = "Bearer" if path.startswith(API_PATHS) else 'Basic realm="selfdoubt: any name, a key as password"'
        headers = {"WWW-Authenticate": scheme}
        message += "; send it as Authorization: Bearer KEY"
        return RequestError(401, message, INVALID_REQUEST, code="invalid_api_key", headers=headers)

    async def _check_body(self, scope: ASGIMessage, receive: Receive) -> Receive:
        """Read and check the body; return a function by which the application receives it again."""
        headers = dict(scope["headers"])
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            if scope["method"] == "POST" and scope["path"].startswith("/v1/"):
                raise RequestError(400, "the body is empty; send a JSON object")
            return receive
        most = self.settings.body_bytes
        too_long = RequestError(413, f"the body is longer than {most} bytes", code="body_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or (int(length) > most and b"expect" in headers):
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive, most)
        except TimeoutError:
            raise RequestError(408, f"the body took longer than {BODY_SECONDS:g} s to arrive") from None
        if body is None:
            raise too_long
        if scope["path"].startswith("/v1/"):
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise RequestError(400, "the body must be JSON, with the header Content-Type: application/json")
            try:
                if len(body) < _LONG:
                    check_body(body, self.settings.depth)
                else:
                    await asyncio.to_thread(check_body, body, self.settings.depth)
            except ValueError as error:
                raise RequestError(400, str(error), code="invalid_json") from None
        return _replay(body, receive)


class _DisconnectedError(Exception):
    """The client went away before its request was complete."""


async def _read(receive: Receive, most: int) -> bytes | None:
    """Return a body, or None if it is longer."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _DisconnectedError
        size += len(message.get("body", b""))
        if size <= most:
            pieces.append(message.get("body", b""))
        if size > DISCARD_FACTOR * most or not message.get("more_body", False):
            return b"".join(pieces) if size <= most else None


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replay() -> ASGIMessage:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _read_key(authorization: str, *, basic: bool) -> str:
    """Return the key in a header: a bearer, or for a browser the password of basic authentication."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if basic and scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


async def _refuse(send: Send, error: RequestError) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
