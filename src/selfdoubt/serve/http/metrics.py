"""Metrics for Prometheus, which reads them at ``/metrics``."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as generate

from selfdoubt.lm.answer import Answer
from selfdoubt.serve.engine.stats import Outcome

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHARES = tuple(i / 10 for i in range(1, 11))
_RISKS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 3, 10, 30, 100)
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/models", "/healthz", "/readyz", "/metrics")


class Metrics:
    """Counters of an engine's work (they are its ``EngineStats``) and of HTTP requests; one registry each."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.active = 0  #: requests to /v1 that are not answered to their last byte

        def name(suffix: str) -> str:
            return f"selfdoubt_{suffix}"

        self._waiting = Gauge(
            name("requests_waiting"), "Requests that wait for a place in the batch", registry=registry
        )
        self._active = Gauge(
            name("requests_active"), "Requests to /v1 that are not answered to the end", registry=registry
        )
        self._running = Gauge(name("sequences_running"), "Sequences in the batch", registry=registry)
        self._cache_bytes = Gauge(name("static_cache_bytes"), "Memory of static key-value caches", registry=registry)
        self._graph_bytes = Gauge(name("cuda_graph_bytes"), "Memory of captured CUDA graphs", registry=registry)
        self._batch = Histogram(name("batch_size"), "Sequences of a step", buckets=_SIZES, registry=registry)
        self._tokens = Counter(name("tokens"), "Tokens made; its rate is tokens per second", registry=registry)
        self._step = Histogram(
            name("inter_token_seconds"), "From one token to the next", buckets=_STEP, registry=registry
        )
        self._first = Histogram(
            name("time_to_first_token_seconds"), "From arrival to the first token", buckets=_SECONDS, registry=registry
        )
        self._answers = Counter(name("answers"), "Answers, by outcome", ["outcome"], registry=registry)
        self._risk = Histogram(name("answer_risk"), "Risk of answers", ["risk_name"], buckets=_RISKS, registry=registry)
        self._percentile = Histogram(
            name("answer_percentile"),
            "Share of reference answers with a lower risk",
            buckets=_SHARES,
            registry=registry,
        )
        self._p_correct = Histogram(
            name("answer_p_correct"), "Probability of being right", buckets=_SHARES, registry=registry
        )
        self._abstained = Counter(name("abstentions"), "Answers that the calibration abstains from", registry=registry)
        self._requests = Counter(name("requests"), "HTTP requests", ["path", "status"], registry=registry)
        self._took = Histogram(
            name("request_seconds"), "From a request to its last byte", ["path"], buckets=_SECONDS, registry=registry
        )
        self._active.set_function(lambda: self.active)
        for outcome in get_args(Outcome):
            self._answers.labels(outcome)  # there from the start, as 0

    def watch(self, engine: object) -> None:
        """Show the number of sequences that an engine decodes, and the memory of its steps."""
        if hasattr(engine, "running"):
            self._running.set_function(lambda: int(engine.running))
        if hasattr(engine, "step_memory"):
            self._cache_bytes.set_function(lambda: int(engine.step_memory.cache_bytes))
            self._graph_bytes.set_function(lambda: int(engine.step_memory.graph_bytes))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate(self.registry)

    def set_waiting(self, requests: int) -> None:
        """See ``EngineStats``."""
        self._waiting.set(requests)

    def record_step(self, sequences: int, seconds: float | None) -> None:
        """See ``EngineStats``."""
        self._batch.observe(sequences)
        if seconds is not None:
            self._step.observe(seconds)

    def record_tokens(self, tokens: int) -> None:
        """See ``EngineStats``."""
        self._tokens.inc(tokens)

    def record_first_token(self, seconds: float) -> None:
        """See ``EngineStats``."""
        self._first.observe(seconds)

    def record_end(self, outcome: Outcome, answer: Answer | None) -> None:
        """See ``EngineStats``."""
        self._answers.labels(outcome).inc()
        if answer is None:
            return
        self._risk.labels(answer.risk_name).observe(answer.risk)
        if answer.percentile is not None:
            self._percentile.observe(answer.percentile)
        if answer.p_correct is not None:
            self._p_correct.observe(answer.p_correct)
        if answer.abstain:
            self._abstained.inc()

    def record_arrival(self, path: str) -> None:
        """Count a request that has arrived."""
        self.active += path.startswith("/v1/")

    def record_reply(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.active -= path.startswith("/v1/")
        known = next((p for p in _PATHS if path == p or (p == "/v1/models" and path.startswith(p + "/"))), "other")
        self._requests.labels(known, str(status)).inc()
        self._took.labels(known).observe(seconds)
