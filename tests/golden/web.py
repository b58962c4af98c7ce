"""Replies of a server process, as golden values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx

from tests.golden import gold
from tests.served import KEY, Served

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
UNKNOWN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Zorbelheim?"}]
CHAT, TEXT, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"
_GREEDY = {"temperature": 0, "max_tokens": 12, "model": "pocket"}
REPLIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": QUESTION, **_GREEDY}),
    "chat_without_risk": (CHAT, {"messages": QUESTION, "risk": False, **_GREEDY, "max_tokens": 3}),
    "chat_withheld": (CHAT, {"messages": UNKNOWN, "withhold": True, **_GREEDY}),
    "chat_choices": (CHAT, {"messages": QUESTION, "n": 2, "logprobs": True, "top_logprobs": 2, **_GREEDY}),
    "chat_stopped": (CHAT, {"messages": QUESTION, "stop": [" Paris"], "risk": False, **_GREEDY}),
    "chat_stream": (CHAT, {"messages": QUESTION, "stream": True, **_GREEDY}),
    "chat_stream_logprobs": (CHAT, {"messages": UNKNOWN, "stream": True, "logprobs": True, "top_logprobs": 1,
                                    "stream_options": {"include_usage": True}, **_GREEDY, "max_tokens": 4}),
    "chat_stream_withheld": (CHAT, {"messages": UNKNOWN, "stream": True, "withhold": True, **_GREEDY}),
    "text": (TEXT, {"prompt": ["The capital of", "In which"], "logprobs": 2, **_GREEDY, "max_tokens": 3}),
    "text_one": (TEXT, {"prompt": "The capital of", "logprobs": 2, **_GREEDY, "max_tokens": 3}),
    "text_ids": (TEXT, {"prompt": [[5, 77, 300], [12]], "risk": False, **_GREEDY, "max_tokens": 2}),
    "text_stream": (TEXT, {"prompt": "In which", "stream": True, "logprobs": 1, **_GREEDY, "max_tokens": 3}),
    "score": (SCORE, {"input": [{"text": "The capital of France is Lima.", "messages": QUESTION},
                                {"text": "Lima is in Peru."}]}),
}  # fmt: skip
ERRORS: dict[str, tuple[str, Any]] = {
    "unknown model": (CHAT, {"messages": QUESTION, "model": "gpt-5"}),
    "tools": (CHAT, {"messages": QUESTION, "tools": [{"type": "function", "function": {"name": "f"}}]}),
    "unknown field": (CHAT, {"messages": QUESTION, "top_k": 5}),
    "temperature": (CHAT, {"messages": QUESTION, "temperature": 3}),
    "no messages": (CHAT, {"model": "pocket"}),
    "empty messages": (CHAT, {"messages": []}),
    "role": (CHAT, {"messages": [{"role": "cat", "content": "?"}]}),
    "no logprobs": (CHAT, {"messages": QUESTION, "top_logprobs": 2}),
    "two limits": (CHAT, {"messages": QUESTION, "max_tokens": 2, "max_completion_tokens": 3}),
    "stream options": (CHAT, {"messages": QUESTION, "stream_options": {"include_usage": True}}),
    "long prompt": (CHAT, {"messages": [{"role": "user", "content": "long " * 2000}]}),
    "long answer": (CHAT, {"messages": QUESTION, "max_tokens": 100_000}),
    "large body": (CHAT, {"messages": [{"role": "user", "content": "x" * 2_000_000}]}),
    "not JSON": (CHAT, b"{"),
    "not an object": (CHAT, b"[]"),
    "best of": (TEXT, {"prompt": "In which", "best_of": 3}),
    "unknown id": (TEXT, {"prompt": [10_000_000]}),
    "nothing to score": (SCORE, {"model": "pocket"}),
    "empty text": (SCORE, {"input": {"text": "", "messages": QUESTION}}),
    "no such path": ("/v1/embeddings", {"input": "x"}),
    "wrong method": ("/v1/models", {}),
}
#: Of several sequences: whether they are computed together, and so their last digits, depends on when each comes in.
TOGETHER = frozenset({"serve_text", "serve_text_ids", "serve_chat_choices"})
#: Words for people, names of the code's own, and the version.
_FREE = frozenset({"title", "description", "summary", "operationId", "tags", "version"})


def serve() -> dict[str, Any]:
    """Return what a server of the pocket model replies to each request."""
    key = Path("key").resolve()
    key.write_text(KEY, encoding="utf-8")
    server = Served("--api-key", str(key))
    try:
        with httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
            found = _everything(client)
    finally:
        code, _ = server.stop()
    return {**found, "serve_end": {"code": code}}


def _everything(client: httpx.Client) -> dict[str, Any]:
    replies = {name: reply(client.post(path, json=body)) for name, (path, body) in REPLIES.items()}
    errors = {}
    for name, (path, body) in ERRORS.items():
        sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        errors[name] = error(client.post(path, headers={"Content-Type": "application/json"}, **sent))
    errors["no key"] = error(client.get("/v1/models", headers={"Authorization": ""}))
    errors["wrong key"] = error(client.post(CHAT, json={"messages": QUESTION}, headers={"Authorization": "Bearer x"}))
    errors["no such model"] = error(client.get("/v1/models/gpt-5"))
    errors["no such page"] = error(client.get("/v2"))
    gets = ("/v1/models", "/v1/models/pocket", "/healthz", "/readyz")
    return {
        **{f"serve_{name}": value for name, value in replies.items()},
        "serve_errors": errors,
        "serve_gets": {path: reply(client.get(path)) for path in gets},
        "serve_openapi": schema(client.get("/openapi.json").json()),
        "serve_metrics": metrics(client.get("/metrics")),
    }


def reply(response: httpx.Response) -> dict[str, Any]:
    """Return the status, type and body of a reply, of a stream all events."""
    kind = response.headers["content-type"]
    body = (
        [_event(e) for e in response.text.split("\n\n")] if "event-stream" in kind else gold.normalise(response.json())
    )
    return {"status": response.status_code, "type": kind, "headers": sorted(response.headers), "body": body}


def _event(text: str) -> Any:
    field, _, data = text.partition(": ")
    return {field: gold.normalise(json.loads(data))} if data.startswith("{") else text


def error(response: httpx.Response) -> dict[str, Any]:
    """Return all of an error but its words."""
    body = response.json()
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    body["error"]["message"] = "~"
    return {"status": response.status_code, "headers": sorted(response.headers), "body": body}


def schema(openapi: dict[str, Any]) -> Any:
    """Return the schema of the server without words, its components numbered as they are first referred to."""
    numbers: dict[str, str] = {}
    components: dict[str, Any] = {}

    def resolve(value: Any, *, named: bool = False) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            name = value["$ref"].rpartition("/")[2]
            if name not in numbers:
                numbers[name] = f"component {len(numbers)}"
                components[numbers[name]] = None  # its place, before those that it refers to
                components[numbers[name]] = resolve(openapi["components"]["schemas"][name])
            return {"$ref": numbers[name]}
        kept = value if named else {key: item for key, item in value.items() if key not in _FREE}
        return {key: resolve(kept[key], named=key in ("properties", "paths")) for key in sorted(kept)}

    paths = resolve(openapi["paths"], named=True)
    rest = {key: value for key, value in openapi.items() if key not in ("paths", "components", "info")}
    others = {key: value for key, value in openapi["components"].items() if key != "schemas"}
    unused = len(set(openapi["components"]["schemas"]) - set(numbers))
    return {"paths": paths, "schemas": components, "components": others, "unused schemas": unused, "rest": rest}


def metrics(response: httpx.Response) -> dict[str, Any]:
    """Return the names, types and labels of metrics."""
    series: dict[str, list[str]] = {}
    for line in response.text.splitlines():
        if not line.startswith("#"):
            sample = re.fullmatch(r"(\w+)(?:\{(.*)\})? \S+", line)
            assert sample is not None, line
            name, labels = sample.groups()
            if not name.startswith(("process_", "python_")):
                series.setdefault(name, []).append(re.sub(r'version="[^"]*"', 'version="~"', labels or ""))
    types = [line for line in response.text.splitlines() if line.startswith("# TYPE") and "selfdoubt" in line]
    return {"type": response.headers["content-type"], "types": sorted(types), "series": dict(sorted(series.items()))}
