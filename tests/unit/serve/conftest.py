"""Servers in this process, with real engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from starlette.testclient import TestClient

from selfdoubt import RiskAwareLM, vote
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.http.app import create_app
from selfdoubt.serve.http.metrics import Metrics
from selfdoubt.serve.http.settings import ServerSettings
from tests import zoo

Serve = Callable[..., TestClient]


@pytest.fixture(scope="session")
def talker() -> RiskAwareLM:
    """Says nonsense in many scripts, with characters that take several tokens."""
    return RiskAwareLM(vote.Wrapper(n_voters=2, rank=2)(zoo.talker()).eval(), zoo.tokenizer())


@pytest.fixture(scope="session")
def pocket() -> RiskAwareLM:
    """Knows places, and when it is not sure."""
    return RiskAwareLM.load("pocket", dtype=torch.float32)


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Serves a model: ``serve(lm, Limits(...), key=..., setting=...)`` gives a client."""
    clients: list[TestClient] = []
    engines: list[Engine] = []

    def start(lm: RiskAwareLM, limits: Limits | None = None, **settings: object) -> TestClient:
        engine = Engine(lm, limits, Metrics())
        engine.start(wait=True)
        engines.append(engine)
        app = create_app(engine, ServerSettings(**{"name": "tiny", **settings}))
        client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)
    for engine in engines:
        engine.close(10)
