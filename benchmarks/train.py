"""What training costs: real tokens per second and peak memory of a step, beside the usual way and the tutorial's.

Same records for all, same run: each arm is a process of its own, and the arms take turns, step by step. `selfdoubt
train` groups records by length, as it always does, the other arms take them as they come; so speeds and their ratios
are those of all steps together. Tokens that are padding do not count. The memory is what a step needs beyond the loaded
model: on a CPU the process's, on a GPU what torch has allocated.

    python -m benchmarks.train [--data FILE] [--vocabularies 49152 128256] [--batch 3] [--rounds 8]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
import traceback
from contextlib import suppress
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import results

ARMS = {
    "tutorial-lora": "the tutorial's way, LoRA",
    "tutorial-vote": "the tutorial's way, 3 voters of rank 16 on q and v",
    "peft": "the usual way: PEFT LoRA, padding to the longest, the model's loss",
    "ours-lora": "`selfdoubt train`, LoRA",
    "ours-vote": "`selfdoubt train`, vote, 3 voters of rank 16 on q and v",
    "ours-sample": "`selfdoubt train`, sample",
    "ours-sculpt": "`selfdoubt train`, sculpt",
}
SHAPES = ("135m", "1b", "3b", "tiny")


class Worker:
    """One arm in a fresh process."""

    def __init__(self, arm: str, options: dict[str, Any]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.arm = arm
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(other, arm, options), daemon=True)
        self._process.start()
        other.close()
        self._answer()

    def step(self, records: list[dict[str, str]]) -> dict[str, float]:
        """Seconds, loss and tokens of a step, and the peak of memory so far."""
        with suppress(BrokenPipeError):  # it has ended: asking for its answer says so
            self._pipe.send(records)
        measured: dict[str, float] = self._answer()
        return measured

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()

    def _answer(self) -> Any:
        try:
            found = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise SystemExit(f"{self.arm} ended with code {self._process.exitcode}: out of memory?") from None
        if isinstance(found, str):
            raise SystemExit(f"{self.arm} failed:\n{found}")
        return found


def _work(pipe: Connection, arm: str, options: dict[str, Any]) -> None:
    import warnings

    from benchmarks.train_arms import Arm, Options, make

    warnings.simplefilter("ignore")
    shared = Options(**options)
    try:
        running = Arm(*make(arm, shared), shared.steps)
        pipe.send(None)
        while (records := pipe.recv()) is not None:
            begin = time.perf_counter()
            loss, tokens = running.step(records)
            seconds = time.perf_counter() - begin
            pipe.send({"seconds": seconds, "loss": loss, "tokens": tokens, "peak": running.peak()})
    except Exception:
        pipe.send(traceback.format_exc())


def measure(arms: list[str], records: list[dict[str, str]], options: dict[str, Any]) -> list[results.Row]:
    """Rows of one model."""
    size, name = options["batch"], f"{options['shape']}, vocabulary {options['vocabulary']:,}"
    warm, records = records[:size], records[size:]
    grouped = by_length(records, size)
    workers = [Worker(arm, options) for arm in arms]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for worker in workers:
        worker.step(warm)
    for turn in range(options["steps"] - 1):
        first = turn % len(workers)
        for worker in workers[first:] + workers[:first]:
            order = grouped if worker.arm.startswith("ours-") else records
            found[worker.arm].append(worker.step(order[turn * size : (turn + 1) * size]))
        last = {arm: steps[-1] for arm, steps in found.items()}
        print(name, turn, {arm: f"{s['seconds']:.2f} s, loss {s['loss']:.2f}" for arm, s in last.items()}, flush=True)
    for worker in workers:
        worker.end()
    return [_row(name, arm, found) for arm in arms]


def by_length(records: list[dict[str, str]], size: int) -> list[dict[str, str]]:
    """Batches of records of about the same length, the batches in a fixed random order."""
    ordered = sorted(records, key=lambda record: sum(map(len, record.values())))
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    random.Random(0).shuffle(batches)
    return [record for batch in batches for record in batch]


def _row(name: str, arm: str, found: dict[str, list[dict[str, float]]]) -> results.Row:
    steps = found[arm]
    speeds = [s["tokens"] / s["seconds"] for s in steps]
    low, _, high = quantiles(speeds, n=4)

    def speed(of: str) -> float:
        return sum(s["tokens"] for s in found[of]) / sum(s["seconds"] for s in found[of])

    peak = found[arm][-1]["peak"]
    tutorial = "tutorial-vote" if arm.endswith("-vote") else "tutorial-lora"
    return {
        "model": name, "arm": arm, "speed": speed(arm), "median": median(speeds), "spread": [low, high],
        "unit": "tokens per second", "seconds": median(s["seconds"] for s in steps),
        "tokens": sum(s["tokens"] for s in steps), "peak": peak,
        "ratio": speed(arm) / speed("peft") if "peft" in found else None,
        "speed_to_tutorial": speed(arm) / speed(tutorial) if tutorial in found else None,
        "memory_to_tutorial": peak / found[tutorial][-1]["peak"] if tutorial in found else None,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The rows of one device as Markdown."""

    def times(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.2f}x"

    lines = []
    for row in record["rows"]:
        low, high = row["spread"]
        lines.append([
            f"{row['model']}: {ARMS[row['arm']]}", f"{row['speed']:,.0f}", f"{low:,.0f}-{high:,.0f}",
            times(row["ratio"]), times(row["speed_to_tutorial"]), f"{row['peak'] / 1e6:,.0f}",
            times(row["memory_to_tutorial"]),
        ])  # fmt: skip
    head = [
        "model: arm", "tokens per second", "quartiles of steps", "speed to PEFT", "speed to the tutorial's way",
        "peak memory, MB", "memory to the tutorial's way",
    ]  # fmt: skip
    settings = record["settings"]
    about = (
        f"{record['device']}; {'nf4' if settings['nf4'] else 'bfloat16'} weights, bf16-mixed, batches of "
        f"{settings['batch']}, at most {settings['length']} tokens an example, {settings['rounds']} rounds; commit "
        f"{record['commit']}, torch {record['versions']['torch']}, transformers {record['versions']['transformers']}, "
        f"peft {record['versions']['peft']}, lightning {settings['lightning']}."
    )
    return results.markdown(head, lines) + "\n\n" + about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/alpaca/alpaca_data.json"))
    parser.add_argument("--shape", default="135m", choices=SHAPES, help="tiny is for trying out: it writes no results")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[49152, 128256])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--batch", type=int, default=3, help="examples in a step, a multiple of the 3 voters")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--length", type=int, default=400, help="longest example in tokens")
    parser.add_argument("--nf4", action="store_true", help="4-bit weights")
    chosen = parser.parse_args()
    if chosen.batch < 3 or chosen.batch % 3 or chosen.rounds < 2:
        parser.error("--batch must be a multiple of 3, and --rounds at least 2")
    if not chosen.data.is_file():
        parser.error(f"there is no file {chosen.data}: give Alpaca's alpaca_data.json with --data")
    from benchmarks.train_arms import write_tokenizer

    steps = chosen.rounds + 1  # one to warm up
    records = json.loads(chosen.data.read_text(encoding="utf-8"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in chosen.vocabularies:
            tokenizer = Path(folder) / str(vocabulary)
            write_tokenizer(records[:10_000], vocabulary, tokenizer)
            options = {
                "shape": chosen.shape, "vocabulary": vocabulary, "batch": chosen.batch, "length": chosen.length,
                "steps": steps, "nf4": chosen.nf4, "tokenizer": str(tokenizer),
            }  # fmt: skip
            rows += measure(chosen.arms, records[: steps * chosen.batch], options)
    settings = {"batch": chosen.batch, "length": chosen.length, "rounds": chosen.rounds, "nf4": chosen.nf4}
    if chosen.shape == "tiny":
        print(json.dumps(rows, indent=1))
    else:
        print(results.write("train", rows, **settings, lightning=version("lightning")))


if __name__ == "__main__":
    main()
