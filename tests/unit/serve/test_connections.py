"""Real sockets on this machine: half a request, none at all, too many connections, and answers that nobody reads."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import uvicorn
from uvicorn.protocols.http import auto

from selfdoubt.errors import ConfigError
from selfdoubt.serve.http import connections
from selfdoubt.serve.http.settings import ServerSettings
from tests.waiting import wait_until

WHOLE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = b"GET / HTTP/1.1\r\nHost: loc"
LATE = b"POST /late HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"


async def app(scope, receive, send):
    """Answers with four letters, or with 32 MB; ``/late`` when its body has come."""
    if scope["path"] == "/late":
        while (await receive()).get("more_body"):
            pass
    size = 1 << 25 if scope["path"] == "/long" else 4
    headers = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(max(1, size >> 16)):
        await send({"type": "http.response.body", "body": b"x" * min(size, 1 << 16), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.fixture(params=["h11", "httptools"])
def module(request, monkeypatch):
    """The guard around one of uvicorn's two protocols."""
    pytest.importorskip(request.param)
    module = importlib.import_module(f"uvicorn.protocols.http.{request.param}_impl")
    protocol = module.H11Protocol if request.param == "h11" else module.HttpToolsProtocol
    monkeypatch.setattr(auto, "AutoHTTPProtocol", protocol)
    spec = importlib.util.spec_from_file_location("guarded_for_test", connections.__file__)
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "guarded_for_test", found)
    spec.loader.exec_module(found)
    assert issubclass(found.GuardedConnection, protocol)
    return found


@contextmanager
def serving(module, **settings):
    guard = module.ConnectionGuard(ServerSettings(**settings))
    config = uvicorn.Config(
        app, http=partial(module.GuardedConnection, guard=guard), log_config=None, log_level="critical", lifespan="off",
        timeout_keep_alive=1000,
    )  # fmt: skip
    own = socket.socket()
    own.bind(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    clients = []

    def connect(data=b""):
        client = socket.create_connection(own.getsockname(), timeout=20)
        clients.append(client)
        client.sendall(data)
        return client

    wait_until(lambda: server.started)
    try:
        yield connect, guard
    finally:
        for client in clients:
            client.close()
        server.should_exit = server.force_exit = True
        thread.join(20)
        own.close()


def rest(client):
    """All that comes until the server closes."""
    found = b""
    with suppress(ConnectionResetError):
        while data := client.recv(1 << 16):
            found += data
    return found


def error(reply):
    """The status of a refusal, and its error."""
    head, _, body = reply.rpartition(b"\r\n\r\n")
    return int(head.split(b"\r\n")[0].split()[1]), json.loads(body)["error"]


def answer(client):
    """One answer with its four letters."""
    found = b""
    while not found.endswith(b"xxxx"):
        data = client.recv(100)
        assert data, found
        found += data
    return found


def test_a_head_that_is_not_complete_in_time_ends_its_connection_and_no_other(module):
    with serving(module, header_seconds=0.3) as (connect, guard):
        half = [connect(HALF) for _ in range(20)]
        silent = connect()
        late = connect(LATE)  # its head is complete: it may take longer
        for client in half:
            status, found = error(rest(client))
            assert (status, found["code"]) == (408, "head_timeout")
            assert "not complete within 0.3 s" in found["message"]
        assert rest(silent) == b""
        late.sendall(b"ab")
        assert b" 200 " in answer(late)
        assert len(guard.open) == 1


def test_a_head_that_comes_drop_by_drop_has_no_more_time(module):
    with serving(module, header_seconds=0.5) as (connect, _):
        client = connect(HALF)
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(400):
                client.sendall(b"a")
                time.sleep(0.05)
            pytest.fail("the connection is still open after 20 s")


def test_an_idle_connection_is_closed_and_one_in_use_is_not(module):
    with serving(module, idle_seconds=0.5, header_seconds=10) as (connect, guard):
        idle, busy = connect(WHOLE), connect(LATE)
        assert b" 200 " in answer(idle)
        assert rest(idle) == b""
        busy.sendall(b"ab")
        answer(busy)
        busy.sendall(WHOLE)
        answer(busy)
        assert rest(busy) == b""
        assert not guard.open


def test_a_second_request_that_is_half_sent_ends_too(module):
    with serving(module, header_seconds=0.3) as (connect, _):
        client = connect(WHOLE)
        answer(client)
        client.sendall(HALF)
        assert error(rest(client))[0] == 408


def test_beyond_the_cap_the_one_that_waited_longest_makes_room(module):
    with serving(module, connections=3) as (connect, guard):
        first, second, busy = connect(HALF), connect(WHOLE), connect(LATE)
        answer(second)
        wait_until(lambda: len(guard.without_request) == 2)  # the first has sent half, the second is idle
        fourth = connect(WHOLE)
        assert b" 200 " in answer(fourth)
        assert error(rest(first))[1]["code"] == "too_many_connections"
        fifth = connect(WHOLE)
        assert b" 200 " in answer(fifth)
        assert rest(second) == b""
        busy.sendall(b"ab")
        assert b" 200 " in answer(busy)


def test_where_all_are_busy_a_further_one_is_told_to_come_back(module):
    with serving(module, connections=2) as (connect, guard):
        busy = [connect(LATE), connect(LATE)]
        wait_until(lambda: len(guard.open) == 2 and not guard.without_request)
        status, found = error(rest(connect(WHOLE)))
        assert (status, found["code"]) == (503, "too_many_connections")
        for client in busy:
            client.sendall(b"ab")
            assert b" 200 " in answer(client)


def test_half_sent_heads_without_end_do_not_keep_others_out(module):
    with serving(module, connections=10, header_seconds=60) as (connect, guard):
        for _ in range(5):
            for _ in range(30):
                connect(HALF)
            assert b" 200 " in answer(connect(WHOLE))
        assert len(guard.open) <= 11


def test_a_head_without_end_is_cut_off(module):
    with serving(module) as (connect, _):
        client = connect(b"GET / HTTP/1.1\r\n")
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(10_000):
                client.sendall(b"X-Long: " + b"a" * 1000 + b"\r\n")
            pytest.fail("10 MB of a head were taken")


def test_a_client_that_does_not_read_is_cut_off(module, monkeypatch):
    monkeypatch.setattr(module, "STALLED_SECONDS", 0.3)
    with serving(module) as (connect, guard):
        client = connect(WHOLE.replace(b"GET / ", b"GET /long "))
        wait_until(lambda: guard.open)
        wait_until(lambda: not guard.open)
        assert len(rest(client)) < 1 << 25


@pytest.mark.parametrize("wrong", [{"connections": 0}, {"header_seconds": 0.0}, {"idle_seconds": float("inf")}])
def test_settings_of_connections_have_limits(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerSettings(**wrong)
