"""What Prometheus reads: counted by a real engine, and read by Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from selfdoubt.serve.engine.stats import EngineStats
from selfdoubt.serve.http.metrics import Metrics
from tests.unit.serve.test_app import CHAT, TEXT, UNKNOWN, ask, events, ok


def read(client):
    """Samples by name and labels."""
    reply = client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    return {
        (s.name, *sorted(s.labels.items())): s.value for family in parse(reply.text) for s in family.samples
    }  # fmt: skip


def test_they_are_stats_of_an_engine():
    assert isinstance(Metrics(), EngineStats)


def test_what_an_engine_does_is_counted(serve, pocket):
    client = serve(pocket)
    before = read(client)
    assert before["selfdoubt_tokens_total",] == 0
    whole = ok(client, temperature=0)
    streamed = events(client, messages=UNKNOWN, temperature=0)
    cut = ok(client, TEXT, prompt="The capital", temperature=0, max_tokens=1)
    ask(client, tools=[{}])
    client.get("/nowhere")
    found = read(client)
    written = whole["usage"]["completion_tokens"] + cut["usage"]["completion_tokens"]
    written += sum(bool(c["choices"][0]["delta"].get("content")) for c in streamed)
    assert found["selfdoubt_tokens_total",] == written
    assert found["selfdoubt_answers_total", ("outcome", "stop")] == 2
    assert found["selfdoubt_answers_total", ("outcome", "length")] == 1
    assert found["selfdoubt_abstentions_total",] >= 1
    assert found["selfdoubt_time_to_first_token_seconds_count",] == 3
    assert found["selfdoubt_batch_size_sum",] == written + 2  # two have taken a step more to end
    # The first token of an answer that is alone comes after no other.
    assert found["selfdoubt_inter_token_seconds_count",] == found["selfdoubt_batch_size_count",] - 3
    assert found["selfdoubt_answer_percentile_count",] == 3
    assert found["selfdoubt_answer_p_correct_count",] == 2  # plain text is nothing that was calibrated on
    assert found["selfdoubt_answer_risk_count", ("risk_name", "rank_nll")] == 3
    assert found["selfdoubt_requests_total", ("path", CHAT), ("status", "200")] == 2
    assert found["selfdoubt_requests_total", ("path", CHAT), ("status", "400")] == 1
    assert found["selfdoubt_requests_total", ("path", "other"), ("status", "404")] == 1
    assert found["selfdoubt_requests_waiting",] == 0
    assert found["selfdoubt_sequences_running",] == 0
    assert found["selfdoubt_requests_active",] == 0
    assert found["process_resident_memory_bytes",] > 1e8


@pytest.mark.parametrize("path", ["/v1/models/a", "/v1/models/b", "/x/1", "/x/2"])
def test_paths_that_clients_make_up_do_not_make_new_series(path):
    metrics = Metrics()
    metrics.record_arrival(path)
    metrics.record_reply(path, 404, 0.1)
    text = metrics.text().decode()
    assert path not in text
    assert metrics.active == 0


def test_two_servers_count_apart():
    first, second = Metrics(), Metrics()
    first.record_tokens(3)
    assert b"selfdoubt_tokens_total 3.0" in first.text()
    assert b"selfdoubt_tokens_total 0.0" in second.text()
