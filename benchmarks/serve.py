"""Speed of a server for many clients: tokens per second, time to the first, time between two, and memory.

Same machine, same model (the pocket, or a shape with random weights), same questions, no end of answer before
``--tokens``; each server is a process of its own and they take turns, one level of clients after the other. Ours sends
a risk with every token; `transformers serve` sends none.

    python -m benchmarks.serve [--models pocket 135m] [--clients 1 8 32 128] [--seconds 60] [--tokens 64]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import torch

from benchmarks import results

ARMS = {
    "ours": "`selfdoubt serve`, 3 voters, a risk per token",
    "ours-plain": "`selfdoubt serve --wrapper none`, a risk per token",
    "alone": "`selfdoubt serve --batch 1`, 3 voters: one at a time",
    "transformers": "`transformers serve`, no risk",
    "transformers-cb": "`transformers serve --continuous-batching`, no risk",
}
BIN = Path(sys.executable).parent


def build_folder(model: str, folder: Path) -> Path:
    """Write the model to a folder, changed so that no answer ends before it is as long as it may be."""
    from transformers import AutoTokenizer

    from benchmarks import arms
    from selfdoubt import pocket

    tokenizer = AutoTokenizer.from_pretrained(pocket.folder())
    network: Any = arms.build(model)
    network.float()
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # a token without letters is no event
    with (
        torch.no_grad()
    ):  # a token that the chat template names as an end gets a logit of 0, and others have larger ones
        network.get_output_embeddings().weight[tokenizer.all_special_ids] = 0
    network.generation_config.eos_token_id = network.config.eos_token_id = None
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": None}))
    return folder


def command(arm: str, folder: Path, port: int) -> list[str]:
    ours = [str(BIN / "selfdoubt"), "serve", "--model", str(folder), "--port", str(port), "--dtype", "float32",
            "--queue", "256", "--name", "m"]  # fmt: skip
    voters = ["--wrapper", "vote:rank=16", "--answer-from", "mean"]
    theirs = [str(BIN / "transformers"), "serve", str(folder), "--port", str(port), "--device", "cpu",
              "--dtype", "float32"]  # fmt: skip
    return {
        "ours": [*ours, *voters],
        "ours-plain": [*ours, "--wrapper", "none"],
        "alone": [*ours, *voters, "--batch", "1"],
        "transformers": theirs,
        "transformers-cb": [*theirs, "--continuous-batching"],
    }[arm]


@contextlib.contextmanager
def server(arm: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Run a server; yields its URL and its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        command(arm, folder, port), stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url + ("/health" if "transformers" in arm else "/readyz")).status_code == 200:
                    break
            if process.poll() is not None:
                log.seek(0)
                raise SystemExit(f"{arm} did not start:\n{log.read()[-2000:]}")
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()


def resident(pid: int) -> float:
    """Return the megabytes of a process and its children in memory."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def load(url: str, model: str, clients: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Let clients ask one question after the other, and return the times that they see."""
    first: list[float] = []
    between: list[float] = []
    count = errors = 0
    start = time.perf_counter()
    end = start + seconds

    async def client(number: int, session: httpx.AsyncClient) -> None:
        nonlocal count, errors
        draw = random.Random(number)
        await asyncio.sleep(min(1.0, seconds / 10) * draw.random())
        while time.perf_counter() < end:
            body = {
                "model": model, "stream": True, "max_tokens": tokens, "temperature": 0,
                "messages": [{"role": "user", "content": f"What is the capital of place {draw.randrange(10**6)}?"}],
            }  # fmt: skip
            asked = last = time.perf_counter()
            seen = False
            async with session.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    errors += 1
                    await asyncio.sleep(0.5)
                    continue
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    if not (choices[0].get("delta") or {}).get("content"):
                        errors += "error" in line[:20]
                        continue
                    now = time.perf_counter()
                    (between if seen else first).append(now - (last if seen else asked))
                    seen, last = True, now
                    count += now < end

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as session:
        await asyncio.gather(*(client(i, session) for i in range(clients)))
    cuts = quantiles([*between, *between], n=100)
    return {
        "tokens_per_s": count / seconds,
        "first_median": median(first), "first_p95": quantiles([*first, *first], n=20)[-1],
        "between_p50": cuts[49], "between_p95": cuts[94], "between_p99": cuts[98],
        "answers": len(first), "errors": errors,
    }  # fmt: skip


def measure(
    model: str,
    arms: list[str],
    clients: list[int],
    seconds: float,
    tokens: int,
    keep: Callable[[list[results.Row]], Any],
) -> None:
    """Measure the servers of one model; ``keep`` gets the rows of each number of clients as soon as they are there."""
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = build_folder(model, Path(place))
        # All wait in memory while one works: they take turns, so that a slow minute of the machine meets all of them.
        running = {arm: stack.enter_context(server(arm, folder)) for arm in arms}
        named = {arm: "m" if arm.startswith(("ours", "alone")) else str(folder) for arm in arms}
        for arm, (url, _) in running.items():
            asyncio.run(load(url, named[arm], 4, 3, 8))  # warm
        for n in clients:
            rows: list[results.Row] = []
            for arm, (url, pid) in running.items():
                before = resident(pid)
                times = asyncio.run(load(url, named[arm], n, seconds, tokens))
                rows.append(
                    {"model": model, "arm": arm, "clients": n, **times, "mb_before": before, "mb_after": resident(pid)}
                )
                print(rows[-1], flush=True)
            alone = next((row["tokens_per_s"] for row in rows if row["arm"] == "alone"), None)
            keep([row | {"ratio": None if alone is None else row["tokens_per_s"] / alone} for row in rows])


def table(record: dict[str, Any]) -> str:
    def cells(row: results.Row) -> list[str]:
        between = " / ".join(f"{1000 * row[f'between_{p}']:.0f}" for p in ("p50", "p95", "p99"))
        return [
            f"{row['model']}, {row['clients']}: {ARMS[row['arm']]}", f"{row['tokens_per_s']:.0f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
            f"{1000 * row['first_median']:.0f} / {1000 * row['first_p95']:.0f}", between,
            f"{row['mb_before']:.0f} -> {row['mb_after']:.0f}", str(row["errors"]),
        ]  # fmt: skip

    head = ["model, clients: server", "tokens/s", "to one at a time", "first token, ms: median / p95",
            "between two, ms: p50 / p95 / p99", "memory, MB", "refused"]  # fmt: skip
    settings = record["settings"]
    note = (
        f"{record['device']}; float32, greedy, {settings['tokens']} tokens per answer, {settings['seconds']:g} s each; "
        f"commit {record['commit']}, torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}."
    )
    return results.markdown(head, [cells(row) for row in record["rows"]]) + "\n\n" + note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pocket"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args()
    rows: list[results.Row] = []

    def keep(more: list[results.Row]) -> None:
        rows.extend(more)
        if not given.dry:
            print(results.write("serve", rows, seconds=given.seconds, tokens=given.tokens), flush=True)

    for model in given.models:
        measure(model, given.arms, given.clients, given.seconds, given.tokens, keep)


if __name__ == "__main__":
    main()
