"""Delays of others by one heavy request: gaps in a running stream, and the latency of one-token chats.

A server process has one stream running and gets a one-token chat every second; then a long prompt, or a long text to
score, comes in. Measured are the pauses between the stream's tokens and the chats' latencies while the heavy request
is worked on.

    python -m benchmarks.gaps FOLDER [--tokens 6000] [--heavy prompt score] [--label after] [--dry]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks import results

WORDS = "The quick brown fox jumps over the lazy dog near the old river bank while seven small birds sing. "


def make_text(folder: Path, tokens: int) -> str:
    """Return English text of about ``tokens`` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    each = len(tokenizer.encode(WORDS * 10, add_special_tokens=False).ids) / 10
    return WORDS * int(tokens / each)


async def measure(url: str, heavy: str, text: str, seconds: float) -> results.Row:
    """Run the three clients until the heavy request has ended or ``seconds`` have passed."""
    arrivals: list[float] = []
    chats: list[tuple[float, float]] = []
    over = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=600) as session:

        async def stream() -> None:
            while not over.is_set():
                body = {"prompt": "Once upon a time", "max_tokens": 1000, "temperature": 1, "stream": True}
                async with session.stream("POST", "/v1/completions", json=body) as reply:
                    async for line in reply.aiter_lines():
                        if over.is_set():
                            return
                        if line.startswith("data: {"):
                            arrivals.append(time.perf_counter())
                arrivals.append(float("nan"))  # a new stream: no gap from the old one's end

        async def chat() -> None:
            while not over.is_set():
                began = time.perf_counter()
                body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
                reply = await session.post("/v1/chat/completions", json=body)
                if reply.status_code == 200:
                    chats.append((began, time.perf_counter() - began))
                await asyncio.sleep(1)

        others = [asyncio.create_task(stream()), asyncio.create_task(chat())]
        await asyncio.sleep(5)
        began = time.perf_counter()
        path, body = {
            "prompt": ("/v1/completions", {"prompt": text, "max_tokens": 1}),
            "score": ("/v1/score", {"input": {"text": text}}),
        }[heavy]
        try:
            status = (await asyncio.wait_for(session.post(path, json=body), seconds)).status_code
        except TimeoutError:
            status = 0
        ended = time.perf_counter()
        await asyncio.sleep(2)
        over.set()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    pairs = list(pairwise(arrivals))
    gaps = sorted(b - a for a, b in pairs if b > began and a < ended)
    before = sorted(b - a for a, b in pairs if b <= began)
    latencies = sorted(took for start, took in chats if start + took > began and start < ended)
    return {
        "heavy": heavy, "status": status, "heavy_s": ended - began,
        "gap_before_p50": median(before), "gap_p50": median(gaps), "gap_p99": gaps[int(0.99 * len(gaps))],
        "gap_max": gaps[-1], "chat_p50": median(latencies), "chat_max": latencies[-1], "chats": len(latencies),
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Return the rows in Markdown."""
    head = ["tree: heavy request", "it took, s", "gaps before, ms: p50", "gaps meanwhile, ms: p50 / p99 / longest",
            "one-token chats, s: median / longest"]  # fmt: skip
    rows = [
        [
            f"{row['label']}: {row['heavy']}", f"{row['heavy_s']:.1f}", f"{1000 * row['gap_before_p50']:.0f}",
            " / ".join(f"{1000 * row[f'gap_{p}']:.0f}" for p in ("p50", "p99", "max")),
            f"{row['chat_p50']:.2f} / {row['chat_max']:.2f}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    settings = record["settings"]
    note = f"{record['device']}; {settings['model']}, float32, {settings['tokens']} tokens; commit {record['commit']}."
    return results.markdown(head, rows) + "\n\n" + note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--heavy", nargs="+", default=["prompt", "score"])
    parser.add_argument("--seconds", type=float, default=200, help="longest wait for a heavy request")
    parser.add_argument("--label", default="after", help="which tree this is")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args()
    process = subprocess.Popen(
        [sys.executable, "-m", "selfdoubt", "serve", "--model", str(given.folder), "--wrapper", "none", "--port", "0",
         "--dtype", "float32", "--timeout", "600"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    rows: list[results.Row] = []
    try:
        assert process.stdout is not None
        url = next(part for part in process.stdout.readline().split() if part.startswith("http")).removesuffix("/v1")
        text = make_text(given.folder, given.tokens)
        for heavy in given.heavy:
            rows.append({"label": given.label, **asyncio.run(measure(url, heavy, text, given.seconds))})
            print(json.dumps(rows[-1]), flush=True)
    finally:
        process.send_signal(signal.SIGTERM)
        began = time.perf_counter()
        try:
            process.wait(100)
        finally:
            process.kill()
        print(f"ended {time.perf_counter() - began:.1f} s after SIGTERM")
    if not given.dry:
        old = results.FOLDER / "gaps-cpu.json"
        kept = [r for r in json.loads(old.read_text())["rows"] if r["label"] != given.label] if old.exists() else []
        print(results.write("gaps", [*kept, *rows], model=given.folder.name, tokens=given.tokens))


if __name__ == "__main__":
    main()
