"""The OpenAPI schema is true: whatever is sent, by the schema or against it, what comes back is in it, and no 5xx."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests import oracles
from tests.served import Served

SECONDS = 20


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    """A tiny model in a process of its own, whose answers are short."""
    arguments = ["--model", str(model_folder), "--wrapper", "vote:n_voters=2,rank=2", "--name", "tiny",
                 "--answer-tokens", "4", "--choices", "4"]  # fmt: skip
    server = Served(*arguments)
    yield server.url
    code, errors = server.stop()
    assert code == 0
    assert errors.startswith("selfdoubt: note: this vote is untrained")
    assert errors.count("\n") == 1


def run(url: str, cases: int) -> Counter[int]:
    """Sends so many generated requests and checks what comes back; the statuses."""
    schemathesis = oracles.load("schemathesis")
    checks = oracles.load("schemathesis.checks")
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    wanted = [
        checks.not_a_server_error,
        *(
            checks.CHECKS.get_one(name)
            for name in (
                "status_code_conformance",
                "content_type_conformance",
                "response_schema_conformance",
                "response_headers_conformance",
                "negative_data_rejection",
            )
        ),
    ]
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses: Counter[int] = Counter()
    bodies = [operation for operation in operations if operation.method.upper() == "POST"]
    assert len(bodies) == 3
    for operation in operations:
        modes = list(schemathesis.GenerationMode) if operation in bodies else [schemathesis.GenerationMode.POSITIVE]
        share = cases // 3 if operation in bodies else cases // 10
        for mode in modes:

            @settings(
                max_examples=share // len(modes),
                derandomize=True,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: object) -> None:
                reply = case.call(timeout=SECONDS)  # type: ignore[attr-defined]
                statuses[reply.status_code] += 1
                case.validate_response(reply, checks=wanted)  # type: ignore[attr-defined]

            check()
    return statuses


def test_generated_requests_get_what_the_schema_says(url: str) -> None:
    statuses = run(url, 100)
    assert statuses[200] > 5
    assert statuses[400] > 5
    assert not [status for status in statuses if status >= 500]


@pytest.mark.slow  # a minute
def test_a_thousand_generated_requests_get_what_the_schema_says(url: str) -> None:
    statuses = run(url, int(os.environ.get("SCHEMATHESIS_CASES", "1000")))
    print(statuses)
    assert not [status for status in statuses if status >= 500]
    assert statuses.total() >= 1000
