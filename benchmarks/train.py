"""What training costs: real tokens per second and peak memory of a step, next to the usual way and the tutorial's.

Same records for all: each arm is a process of its own. On a CPU the arms take turns, step by step, so that all meet the
same machine; on a GPU one runs after the other (``--apart``), and each row is written as soon as it is there: a run
that was cut off, or came to the end of its ``--minutes``, goes on where it ended. `selfdoubt train` groups records by
length, as it always does, or packs them into full rows; the other arms take them as they come. Speeds and their ratios
are those of all steps together. Tokens that are padding do not count. The memory is what a step needs beyond the loaded
model: on a CPU the process's, on a GPU what torch has allocated.

    python -m benchmarks.train [--data FILE] [--vocabularies 49152 128256] [--batch 3] [--rounds 8]
    python -m benchmarks.train --shape 3b --vocabularies 128256 --nf4 --batch 12 --minutes 8       # on a GPU
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

import torch

from benchmarks import results

Rows = list[list[dict[str, str]]]
ARMS = {
    "tutorial-lora": "the tutorial's way, LoRA",
    "tutorial-vote": "the tutorial's way, 3 voters of rank 16 on q and v",
    "peft": "the usual way: PEFT LoRA, padding to the longest, the model's loss",
    "ours-lora": "`selfdoubt train`, LoRA",
    "ours-vote": "`selfdoubt train`, vote, 3 voters of rank 16 on q and v",
    "ours-sample": "`selfdoubt train`, sample",
    "ours-sculpt": "`selfdoubt train`, sculpt",
    "ours-lora-packed": "`selfdoubt train --pack`, LoRA",
    "ours-vote-packed": "`selfdoubt train --pack`, vote",
    "ours-lora-checkpointed": "`selfdoubt train --checkpointing`, LoRA",
    "ours-vote-checkpointed": "`selfdoubt train --checkpointing`, vote",
    "ours-lora-packed-compiled": "`selfdoubt train --pack --compile`, LoRA",
    "ours-vote-packed-compiled": "`selfdoubt train --pack --compile`, vote",
    "ours-vote-packed-checkpointed": "`selfdoubt train --pack --checkpointing`, vote",
}
#: Arms of a run on a CPU; on a GPU all.
ON_A_CPU = tuple(ARMS)[:7]
SHAPES = ("135m", "1b", "3b", "tiny")
#: Steps that warm an arm up: compiled code meets a first and a second shape.
WARM, WARM_COMPILED = 1, 3


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

    def step(self, rows: Rows) -> dict[str, float]:
        """Seconds, loss and tokens of a step, and the peak of memory so far."""
        with suppress(BrokenPipeError):  # it has ended: asking for its answer says so
            self._pipe.send(rows)
        measured: dict[str, float] = self._answer()
        return measured

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise SystemExit(f"{self.arm} ended with code {self._process.exitcode}: out of memory?") from None
        if isinstance(answer, str):
            raise SystemExit(f"{self.arm} failed:\n{answer}")
        return answer


def _work(pipe: Connection, arm: str, options: dict[str, Any]) -> None:
    import warnings

    from benchmarks.train_arms import Arm, Options, make

    warnings.simplefilter("ignore")
    shared = Options(**options)
    try:
        running = Arm(*make(arm, shared), shared.steps)
        pipe.send(None)
        while (rows := pipe.recv()) is not None:
            begin = time.perf_counter()
            loss, tokens = running.step(rows)
            seconds = time.perf_counter() - begin
            pipe.send({"seconds": seconds, "loss": loss, "tokens": tokens, "peak": running.peak()})
    except Exception:
        pipe.send(traceback.format_exc())


def measure(arms: list[str], records: list[dict[str, str]], options: dict[str, Any]) -> list[results.Row]:
    """Rows of one model, its arms in turns."""
    orders = {arm: order_rows(arm, records, options) for arm in arms}
    workers = [Worker(arm, options) for arm in arms]
    steps: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    warming = {worker.arm: warm_up(worker, orders[worker.arm]) for worker in workers}
    for turn in range(options["steps"] - WARM_COMPILED):
        first = turn % len(workers)
        for worker in workers[first:] + workers[:first]:
            steps[worker.arm].append(worker.step(orders[worker.arm][WARM_COMPILED + turn]))
        last = {arm: measured[-1] for arm, measured in steps.items()}
        print(turn, {arm: f"{s['seconds']:.2f} s, loss {s['loss']:.2f}" for arm, s in last.items()}, flush=True)
    for worker in workers:
        worker.end()
    return [summarize(arm, steps[arm], warming[arm], options) for arm in arms]


def order_rows(arm: str, records: list[dict[str, str]], options: dict[str, Any]) -> list[Rows]:
    """Return the rows of each step of an arm: those that warm it up, then those that are measured."""
    size, steps = options["batch"], options["steps"]
    if "packed" in arm:
        from benchmarks.train_ours import pack

        rows = pack(records, options["tokenizer"], options["length"])
    else:
        records = records[: steps * size]
        warm = WARM_COMPILED * size
        rest = by_length(records[warm:], size) if arm.startswith("ours-") else records[warm:]
        rows = [[record] for record in (*records[:warm], *rest)]
    if len(rows) < steps * size:
        raise SystemExit(f"{arm} needs {steps * size} rows, and the records fill {len(rows)}; give more data")
    return [rows[i : i + size] for i in range(0, steps * size, size)]


def warm_up(worker: Worker, order: list[Rows]) -> float:
    """Take the first steps of an arm; return their seconds, in which it compiles what it does."""
    count = WARM_COMPILED if "compiled" in worker.arm else WARM
    return sum(worker.step(rows)["seconds"] for rows in order[:count])


def measure_apart(arm: str, records: list[dict[str, str]], options: dict[str, Any]) -> results.Row:
    """Row of one arm of one model, alone."""
    order, worker = order_rows(arm, records, options), Worker(arm, options)
    warming = warm_up(worker, order)
    steps = [worker.step(rows) for rows in order[WARM_COMPILED:]]
    worker.end()
    return summarize(arm, steps, warming, options)


def by_length(records: list[dict[str, str]], size: int) -> list[dict[str, str]]:
    """Batches of records of about the same length, the batches in a fixed random order."""
    ordered = sorted(records, key=lambda record: sum(map(len, record.values())))
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    random.Random(0).shuffle(batches)
    return [record for batch in batches for record in batch]


def name_model(options: dict[str, Any]) -> str:
    """Return the model's name in a row."""
    return f"{options['shape']}, vocabulary {options['vocabulary']:,}"


def summarize(arm: str, steps: list[dict[str, float]], warming: float, options: dict[str, Any]) -> results.Row:
    """Return the row of one arm, without ratios to others."""
    speeds = [s["tokens"] / s["seconds"] for s in steps]
    low, _, high = quantiles(speeds, n=4)
    tokens = sum(s["tokens"] for s in steps)
    return {
        "model": name_model(options), "arm": arm, "speed": tokens / sum(s["seconds"] for s in steps),
        "median": median(speeds), "spread": [low, high], "unit": "tokens per second",
        "seconds": median(s["seconds"] for s in steps), "tokens": tokens, "peak": steps[-1]["peak"],
        "warming": warming, "commit": results.read_commit(),
    }  # fmt: skip


def add_ratios(rows: list[results.Row]) -> list[results.Row]:
    """Return rows with their ratios to PEFT and to the tutorial's way, of the same model, where those are there."""
    by_name = {(row["model"], row["arm"]): row for row in rows}
    with_ratios = []
    for row in rows:
        peft = by_name.get((row["model"], "peft"))
        name = "tutorial-vote" if row["arm"].startswith(("ours-vote", "tutorial-vote")) else "tutorial-lora"
        tutorial = by_name.get((row["model"], name))
        with_ratios.append(row | {
            "ratio": row["speed"] / peft["speed"] if peft else None,
            "speed_to_tutorial": row["speed"] / tutorial["speed"] if tutorial else None,
            "memory_to_tutorial": row["peak"] / tutorial["peak"] if tutorial else None,
        })  # fmt: skip
    return with_ratios


def read_rows(path: Path, settings: dict[str, Any], *, again: bool) -> list[results.Row]:
    """Return the rows of a file that stand: measured at this commit with these settings; none if all are to run."""
    if again or not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if any(record["settings"].get(name) != value for name, value in settings.items()):
        return []
    return [row for row in record["rows"] if row.get("commit") == results.read_commit()]


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
    parser.add_argument("--shape", default="135m", choices=SHAPES, help="tiny is for trying out: it has no tables")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[49152, 128256])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="[default: all on a GPU, some on a CPU]")
    parser.add_argument("--batch", type=int, default=3, help="rows in a step, a multiple of the 3 voters")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--length", type=int, default=400, help="longest example in tokens")
    parser.add_argument("--nf4", action="store_true", help="4-bit weights")
    parser.add_argument("--apart", action="store_true", help="one arm after the other, as always on a GPU")
    parser.add_argument("--minutes", type=float, help="begin no arm that would end after this time")
    parser.add_argument("--again", action="store_true", help="measure arms that have a row of this commit, too")
    parser.add_argument("--results", type=Path, help="file of the rows, without tables [default: that of the device]")
    chosen = parser.parse_args()
    if chosen.batch < 3 or chosen.batch % 3 or chosen.rounds < 2:
        parser.error("--batch must be a multiple of 3, and --rounds at least 2")
    if not chosen.data.is_file():
        parser.error(f"there is no file {chosen.data}: give Alpaca's alpaca_data.json with --data")
    if chosen.shape == "tiny" and chosen.results is None:
        parser.error("--shape tiny is for trying out: say where its rows go, e.g. --results /tmp/rows.json")
    on_gpu = torch.cuda.is_available()
    apart = chosen.apart or on_gpu
    arms = chosen.arms or list(ARMS if on_gpu else ON_A_CPU)
    records = json.loads(chosen.data.read_text(encoding="utf-8"))
    settings = {"batch": chosen.batch, "length": chosen.length, "rounds": chosen.rounds, "nf4": chosen.nf4}
    path = chosen.results or results.find_path("train")
    rows = read_rows(path, settings, again=chosen.again)
    steps = chosen.rounds + WARM_COMPILED
    pool = records[: 8 * steps * chosen.batch]  # a packed row holds several

    def write() -> None:
        every = {**settings, "lightning": version("lightning")}
        print(results.write("train", add_ratios(rows), path=chosen.results, **every), flush=True)

    begin, longest = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in chosen.vocabularies:
            options = {
                "shape": chosen.shape, "vocabulary": vocabulary, "batch": chosen.batch, "length": chosen.length,
                "steps": steps, "nf4": chosen.nf4, "tokenizer": str(Path(folder) / str(vocabulary)),
            }  # fmt: skip
            there = {row["arm"] for row in rows if row["model"] == name_model(options)}
            missing = [arm for arm in arms if arm not in there]
            if not missing:
                continue
            from benchmarks.train_arms import write_tokenizer

            write_tokenizer(records[:10_000], vocabulary, Path(options["tokenizer"]))
            if not apart:
                rows += measure(missing, pool, options)
                write()
                continue
            for arm in missing:
                start = time.monotonic()
                if chosen.minutes is not None and start - begin + longest > 60 * chosen.minutes:
                    print(f"no time for {arm} and what follows; the same command goes on there")
                    return
                print(f"{name_model(options)}: {arm}", flush=True)
                try:
                    rows.append(measure_apart(arm, pool, options))
                except SystemExit as error:  # the other arms can do without it
                    print(error, flush=True)
                    continue
                write()
                longest = max(longest, time.monotonic() - start)


if __name__ == "__main__":
    main()
