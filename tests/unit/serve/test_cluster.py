"""A cluster that cannot start says so in one line."""

from __future__ import annotations

import warnings

import pytest

from selfdoubt.errors import EngineError


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        from selfdoubt.serve.ray import cluster
    return cluster


@pytest.mark.parametrize("name", ["ActorDiedError", "GetTimeoutError", None])
def test_proxies_that_do_not_start_are_an_error_of_one_line(cluster, monkeypatch, name):
    def fail(**_options):
        raise RuntimeError("no proxy\nat all") if name is None else getattr(cluster.ray.exceptions, name)()

    monkeypatch.setattr(cluster.ray_serve, "start", fail)
    with pytest.raises(EngineError, match=r"^Ray's proxies do not start \(.+\); try again .* --port$") as caught:
        cluster.start_proxies({}, {})
    assert "\n" not in str(caught.value)
