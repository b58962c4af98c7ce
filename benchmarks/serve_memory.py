"""Memory of a server while requests of every kind and size come and go.

One server process per arm, on the loopback address. A few clients send the same seeded requests to each: chats and
streams with up to four answers, completions of several prompts, scores of several texts, and bodies of up to a megabyte
that are refused. Memory is read from the system (``smaps_rollup``) every few seconds, of the process and its children.

    python -m benchmarks.serve_memory [--requests 20000] [--arms bounded unbounded] [--dtype auto] [--clients 6]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks import results

ARMS = {"bounded": "`selfdoubt serve`", "unbounded": "the same without its bounds"}
#: Arguments that start each arm.
START = {
    "bounded": ["-m", "selfdoubt"],
    "unbounded": ["-c", (
        "from selfdoubt.serve.engine import memory; from selfdoubt.cli import main; "
        "memory.bound_process_memory = lambda: None; memory.limit_shapes = lambda lm: None; main()"
    )],
}  # fmt: skip
SAMPLE_SECONDS = 10.0
Body = tuple[str, dict[str, Any]]


def request(number: int) -> Body:
    """Return the path and the body of one request; the same number gives the same request."""
    draw = random.Random(number)
    kind = draw.random()
    tokens = int(2 ** draw.uniform(0, 4.5))  # 1 to 22, short ones more often
    top = 9.5 if draw.random() < 0.05 else 8.3  # longest text: 2**top characters
    common = {
        "max_tokens": tokens, "temperature": draw.choice([0, 0.7, 1, 1.5]), "seed": draw.randrange(2**31),
        "top_p": draw.choice([1, 0.9]),
    }  # fmt: skip
    if kind < 0.01:  # refused: longer than the model's context, up to the longest body that is read
        return "/v1/chat/completions", {"messages": _chat(draw, int(2 ** draw.uniform(13, 19.9)))}
    if kind < 0.015:  # refused: longer than any body may be
        return "/v1/completions", {"prompt": _words(draw, 1_100_000), **common}
    if kind < 0.65:
        body = {"messages": _chat(draw, int(2 ** draw.uniform(3, top))), **common, "stream": draw.random() < 0.5}
        if draw.random() < 0.3:
            body["n"] = draw.randint(2, 4)
        if draw.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": draw.randint(0, 5)}
        return "/v1/chat/completions", body
    if kind < 0.82:
        prompts = [_words(draw, int(2 ** draw.uniform(3, top))) for _ in range(draw.randint(1, 4))]
        return "/v1/completions", {"prompt": prompts, **common, "stream": draw.random() < 0.3}
    texts = [_words(draw, int(2 ** draw.uniform(2, top))) for _ in range(draw.randint(1, 4))]
    return "/v1/score", {
        "input": [{"text": t, **({"question": _words(draw, 60)} if draw.random() < 0.7 else {})} for t in texts]
    }


def _words(draw: random.Random, length: int) -> str:
    """Return a text of this many characters, of made-up words."""
    letters = "".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", k=min(length, 20_000)))
    words, at = [], 0
    while at < len(letters):
        size = draw.randint(2, 9)
        words.append(letters[at : at + size])
        at += size
    text = " ".join(words)
    return (text * (length // len(text) + 1))[:length].strip() or "a"


def _chat(draw: random.Random, length: int) -> list[dict[str, str]]:
    turns = draw.choice([1, 1, 1, 3])
    roles = ["user", "assistant", "user"][-turns:] if turns > 1 else ["user"]
    return [{"role": role, "content": _words(draw, max(3, length // turns))} for role in roles]


@contextlib.contextmanager
def server(arm: str, environment: dict[str, str], *options: str) -> Iterator[tuple[str, int]]:
    """Run a server; yields its URL and its process id."""
    process = subprocess.Popen(
        [sys.executable, *START[arm], "serve", "--port", "0", *options],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        url = re.search(r"http://\S+(?=/v1)", line)
        if url is None:
            raise SystemExit(f"the server did not start: {line}")
        yield url[0], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def memory(pid: int) -> dict[str, float]:
    """Return the megabytes of a process and its descendants: resident, proportional, and what is no file's."""
    total = {"Rss": 0.0, "Pss": 0.0, "Anonymous": 0.0}
    for each in _family(pid):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
            for name in total:
                found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
                total[name] += int(found[1]) / 1024 if found else 0
    return {f"{name.lower()}_mb": round(value, 1) for name, value in total.items()}


def _family(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += _family(int(child))
    return found


async def load(url: str, pid: int, arm: str, requests: int, clients: int, seconds: float) -> list[results.Row]:
    """Send the requests, and read the server's memory meanwhile."""
    rows: list[results.Row] = []
    status: dict[int, int] = {}
    tokens = done = asked = 0
    start = time.perf_counter()

    def sample() -> None:
        rows.append({"arm": arm, "requests": done, "seconds": round(time.perf_counter() - start, 1), **memory(pid)})
        if len(rows) % 10 == 1:
            print(rows[-1] | {"tokens": tokens, "status": status}, flush=True)

    async def watch() -> None:
        while True:
            sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def client(session: httpx.AsyncClient) -> None:
        nonlocal tokens, done, asked
        while asked < requests and time.perf_counter() - start < seconds:
            number, asked = asked, asked + 1
            path, body = request(number)
            async with session.stream("POST", url + path, json=body) as reply:
                text = (await reply.aread()).decode()
            status[reply.status_code] = status.get(reply.status_code, 0) + 1
            if reply.status_code >= 500:
                print(path, text[:200], flush=True)
            match = re.search(r'"completion_tokens": ?(\d+)', text)
            tokens += int(match[1]) if match else text.count("data: {")
            done += 1

    watching = asyncio.create_task(watch())
    async with httpx.AsyncClient(timeout=None) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    watching.cancel()
    sample()
    await asyncio.sleep(5)  # an idle server returns free memory
    sample()
    for row in rows:
        row["status"] = None
    rows[-1] |= {"status": status, "tokens": tokens}
    return rows


def measure(
    arms: list[str], requests: int, seconds: list[float], clients: int, dtype: str, environment: dict[str, str]
) -> list[results.Row]:
    """Run the arms one after the other."""
    rows: list[results.Row] = []
    for arm, limit in zip(arms, seconds, strict=True):
        with server(arm, environment, "--dtype", dtype) as (url, pid):
            rows += asyncio.run(load(url, pid, arm, requests, clients, limit))
    return rows


def table(record: dict[str, Any]) -> str:
    """Return the table: memory at the start, and its median and its most in each fifth of the requests."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in record["rows"]):
        own = [row for row in record["rows"] if row["arm"] == arm]
        count = own[-1]["requests"]
        fifths: list[list[float]] = [[] for _ in range(5)]
        for row in own[1:-1]:
            fifths[min(4, 5 * row["requests"] // max(1, count))].append(row["rss_mb"])
        cells = [f"{median(part):.0f} ({max(part):.0f})" if part else "" for part in fifths]
        lines.append([ARMS[arm], f"{count:,}", f"{own[0]['rss_mb']:.0f}", *cells, f"{own[-1]['rss_mb']:.0f}"])
    head = ["server", "requests", "start", "fifth 1", "2", "3", "4", "5", "5 s after the last"]
    settings = record["settings"]
    note = (
        f"MB resident, median (most). {record['device']}; the pocket model, 3 voters, {settings['dtype']}, "
        f"{settings['clients']} clients; commit {record['commit']}, torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}."
    )
    return results.markdown(head, lines) + "\n\n" + note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seconds", nargs="+", type=float, default=[7200, 600], help="at most so long, per arm")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="environment of every arm")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args()
    environment = dict(pair.split("=", 1) for pair in given.set)
    seconds = given.seconds[: len(given.arms)]
    rows = measure(given.arms, given.requests, seconds, given.clients, given.dtype, environment)
    if not given.dry:
        print(results.write("memory", rows, clients=given.clients, dtype=given.dtype, environment=environment))


if __name__ == "__main__":
    main()
