"""The server as its users meet it: a real process, and the clients that they already have."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import httpx
import openai
import pytest

QUESTION = "What is the capital of France?"
TEXT = "The capital of France is Paris."
CHAT = [{"role": "user", "content": QUESTION}]
UNKNOWN = [{"role": "user", "content": "Where is Zorbelheim?"}]


class Served:
    """A server process."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "selfdoubt", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", self.line)
        if found is None:
            pytest.fail(f"the server did not start: {self.line}{self.process.communicate()}")
        self.url = found[0]

    def stop(self) -> tuple[int, str]:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def measured(self, name: str) -> float:
        """A number of /metrics."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_the_line_at_the_start_says_where_what_and_for_whom(served: Served) -> None:
    assert served.line.startswith("selfdoubt serves pocket at http://127.0.0.1:")
    assert "needs no key: only this machine can connect" in served.line


def test_the_openai_client_gets_an_answer_with_its_risk(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="pocket", messages=CHAT, temperature=0)
    choice = reply.choices[0]
    assert choice.message.content == TEXT
    assert choice.finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert choice.risk["p_correct"] > 0.9
    assert choice.risk["abstain"] is False
    assert "".join(token["text"] for token in choice.risk["tokens"]) == TEXT
    doubtful = client.chat.completions.create(model="pocket", messages=UNKNOWN, temperature=0).choices[0]
    assert doubtful.risk["abstain"] is True
    assert doubtful.risk["risk"] > choice.risk["risk"]
    assert doubtful.risk["question"]["risk"] > choice.risk["question"]["risk"]


def test_the_openai_client_streams_tokens_with_their_risk(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="pocket", messages=CHAT, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [c.choices[0] for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(p.delta.content for p in pieces) == TEXT
    assert len(pieces) > 3
    for piece in pieces:
        assert piece.risk["text"] == piece.delta.content
        assert piece.risk["total"] == pytest.approx(piece.risk["aleatoric"] + piece.risk["epistemic"], abs=1e-5)
    last = chunks[-2].choices[0]
    assert last.finish_reason == "stop"
    whole = client.chat.completions.create(model="pocket", messages=CHAT, temperature=0).choices[0]
    assert last.risk["risk"] == pytest.approx(whole.risk["risk"], abs=1e-5)
    assert chunks[-1].usage.completion_tokens == len(pieces)
    assert json.loads(chunks[0].model_dump_json())["choices"][0]["risk"]["question"]["risk"] > 0


def test_the_asynchronous_client_asks_many_at_once(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            ask = client.chat.completions.create
            replies = await asyncio.gather(*(ask(model="pocket", messages=CHAT, temperature=0) for _ in range(6)))
            stream = await ask(model="pocket", messages=CHAT, temperature=0, stream=True)
            streamed = [c.choices[0].delta.content or "" async for c in stream]
            return [*(r.choices[0].message.content for r in replies), "".join(streamed)]

    assert asyncio.run(ask()) == [TEXT] * 7
