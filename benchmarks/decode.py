"""What a risk costs: time per token with risk against plain Hugging Face ``generate``, one sequence.

Same model, same run: the arms (``benchmarks.arms``) take turns, round by round, and each round gives every arm one
time. Reading the prompt is the time until the first token. Rows are written after each round, so that a run that is cut
off loses nothing and goes on where it stopped.

    python -m benchmarks.decode [--models pocket 135m 1b] [--tokens 32] [--rounds 7]
    python -m benchmarks.decode --models 1b --members 1 2 3 5 8 16 --modes captured   # cost against members, and a plot
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks import arms, results
from selfdoubt.errors import SelfdoubtError
from selfdoubt.lm.hardware import measure_bandwidth

KEYS = ("model", "arm", "batch", "prompt")
#: Arms by default: on a GPU graphs are what counts, on a CPU they do not exist.
CPU_ARMS = ("hf", "hf-rows", "bare", "plain", "free", "vote3", "vote3-late", "vote3-answer", "sample5", "sculpt",
            "separate3")  # fmt: skip
GPU_ARMS = (
    "hf", "hf-static", "plain", "plain+captured", "free+captured", "vote3", "vote3+captured", "vote3+compiled",
    "vote3-late+captured", "vote3-answer+captured", "sample5+captured", "sculpt+captured", "separate3",
)  # fmt: skip
#: Arms without a risk, the fastest of which a risk is compared with, too.
PLAIN_ARMS = ("hf", "hf-rows", "hf-static")


@dataclass(frozen=True)
class Cell:
    """One size at which all arms are measured."""

    model: str
    batch: int = 1
    prompt: int = 32
    tokens: int = 32
    rounds: int = 7


def measure(cell: Cell, names: Sequence[str], rows: results.RowFile, until: float | None = None) -> None:
    """Measure a cell's arms in turns, and write their rows after each round.

    An arm that fails (out of memory, say) gets a row that says why.

    Args:
        cell: The sizes.
        names: Names of the arms; "hf" comes first, as all others are compared with it.
        rows: Where rows go; nothing is measured if all arms are there already.
        until: Time after which no round begins.
    """
    about = {"model": cell.model, "batch": cell.batch, "prompt": cell.prompt}
    known = [rows.find(arm=name, **about) for name in names]
    if all(row is not None and ("error" in row or row["rounds"] >= cell.rounds) for row in known):
        return
    model = arms.build(cell.model)
    runs: dict[str, arms.Run | None] = dict.fromkeys(names)  # built at their first turn
    floor = arms.count_bytes(model) / measure_bandwidth(arms.choose_device())
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(10, int(model.config.vocab_size), (cell.batch, cell.prompt), generator=draw).tolist()
    times: dict[str, list[arms.Times]] = {name: [] for name in names}
    for turn in range(cell.rounds + 1):
        for name in list(runs):
            if until is not None and time.monotonic() > until:
                return
            try:
                runs[name] = run = runs[name] or arms.build_run(arms.parse_arm(name), model)
                seconds = run(prompts, cell.tokens + 1)
            except (RuntimeError, TypeError, ValueError, SelfdoubtError) as error:
                rows.add({**about, "arm": name, "error": " ".join(str(error).split())[:300]})
                del runs[name], times[name]
                _free()
                continue
            if turn:  # the first round warms up, compiles and captures
                times[name].append(seconds)
        for name in runs if turn else ():
            rows.add({**about, "arm": name, **summarize(name, times, cell, floor)})
        print(about, turn, {a: f"{t[-1].token * 1e3:.2f} ms" for a, t in times.items() if t}, flush=True)
    del runs, model
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summarize(name: str, times: dict[str, list[arms.Times]], cell: Cell, floor: float) -> results.Row:
    """Return medians, and ratios to plain arms; ``floor`` is the time of reading all weights once, seconds."""
    mine = times[name]
    # Ratios of one round share the machine's mood: their median is steadier than a ratio of medians.
    row: results.Row = {"median": median(t.token for t in mine), "rounds": len(mine), "unit": "seconds per token"}
    row["spread"] = quantiles([t.token for t in mine], n=4)[::2] if len(mine) > 1 else [mine[0].token] * 2
    row["tokens per second"] = round(cell.batch / row["median"], 1)
    row["floor"] = floor
    if times.get("hf"):
        row["ratio"] = round(median(a.token / b.token for a, b in zip(mine, times["hf"], strict=True)), 3)
        row["prompt_ratio"] = round(median(a.prompt / b.prompt for a, b in zip(mine, times["hf"], strict=True)), 3)
        best = [
            min(t.token for t in turn) for turn in zip(*(times[p] for p in PLAIN_ARMS if times.get(p)), strict=True)
        ]
        row["ratio_to_best"] = round(median(a.token / b for a, b in zip(mine, best, strict=True)), 3)
    row["prompt"] = cell.prompt
    row["prompt_median"] = median(t.prompt for t in mine)
    return row


def table(record: dict[str, Any]) -> str:
    """Return the rows of one device as Markdown."""
    lines = []
    for row in record["rows"]:
        about = f"{row['model']}: {arms.parse_arm(row['arm']).about}"
        if "error" in row:
            lines.append([about, row["error"][:60], "", "", "", ""])
            continue
        low, high = row["spread"]
        ratios = [f"{row[key]:.2f}x" if key in row else "" for key in ("ratio", "ratio_to_best", "prompt_ratio")]
        lines.append([about, f"{row['median'] * 1e3:.2f}", f"{low * 1e3:.2f}-{high * 1e3:.2f}", *ratios])
    head = ["model: arm", "ms per token, median", "quartiles", "to `generate`", "to the faster of its forms",
            "first token"]  # fmt: skip
    rounds = sorted({row["rounds"] for row in record["rows"] if "rounds" in row})
    commits = dict.fromkeys(row.get("commit", record["commit"]) for row in record["rows"])
    text = (
        f"{record['device']}; bfloat16, one sequence, {record['settings']['prompt']} tokens of prompt, "
        f"{record['settings']['tokens']} of answer, {'-'.join(map(str, {rounds[0], rounds[-1]}))} rounds; commit "
        f"{', '.join(commits)}, torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}. "
        "The floor, all weights read once at the bandwidth of a large copy: "
        + ", ".join(f"{model} {floor * 1e3:.2f} ms" for model, floor in _floors(record).items()) + "."
    )  # fmt: skip
    return results.markdown(head, lines) + "\n\n" + text


def _floors(record: dict[str, Any]) -> dict[str, float]:
    return {row["model"]: row["floor"] for row in record["rows"] if "floor" in row}


def table_members(record: dict[str, Any]) -> str:
    """Return the cost of members on one device as Markdown: their table, and a picture that is drawn next to it."""
    picture = results.FOLDER / (results.name_device(record["device"], "members") + ".png")
    shown = f"![Cost of a step against the number of members](results/{picture.name})\n\n"
    return (shown if plot_members(record, picture) else "") + table(record)


def plot_members(record: dict[str, Any], path: Path) -> bool:
    """Draw the cost of a step against the number of members, with the floor of the bandwidth; False without rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in record["rows"]:
        arm = arms.parse_arm(row["arm"])
        if "median" in row and arm.kind in ("vote", "sample", "separate") and not arm.place:
            curves.setdefault((row["model"], arm.kind, arm.mode), {})[arm.members] = row["median"] * 1e3
    models = sorted({model for (model, _, _), points in curves.items() if len(points) > 2})
    if not models:
        return False
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        for (of, kind, mode), points in sorted(curves.items()):
            if of == model and len(points) > 2:
                counts = sorted(points)
                axis.plot(counts, [points[n] for n in counts], marker="o", label=f"{kind}, {mode}")
        axis.axhline(_floors(record)[model] * 1e3, color="0.5", linestyle="--", label="weights read once")
        for row in record["rows"]:
            if row["model"] == model and row["arm"] == "hf" and "median" in row:
                axis.axhline(row["median"] * 1e3, color="0.2", linestyle=":", label="Hugging Face `generate`, no risk")
        axis.set(title=model, xlabel="members", ylabel="ms per token", ylim=(0, None))
        axis.legend(fontsize="small")
    figure.suptitle(record["device"], fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def name_sweep(members: Sequence[int], modes: Sequence[str]) -> list[str]:
    """Return the names of arms with these numbers of voters in these modes, after plain ``generate``."""
    suffixes = ["" if mode == "eager" else f"+{mode}" for mode in modes]
    return ["hf", *(f"vote{n}{suffix}" for suffix in suffixes for n in members)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["pocket", "135m", "1b"], choices=["pocket", *arms.SHAPES])
    parser.add_argument("--arms", nargs="+", default=GPU_ARMS if torch.cuda.is_available() else CPU_ARMS)
    parser.add_argument("--members", nargs="+", type=int, default=[], help="numbers of voters to compare instead")
    parser.add_argument("--modes", nargs="+", default=["eager"], help="of --members: eager, static, captured, compiled")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=None, help="begin no round after this time")
    parser.add_argument("--again", action="store_true", help="measure again what this commit has measured")
    chosen = parser.parse_args()
    until = None if chosen.minutes is None else time.monotonic() + 60 * chosen.minutes
    names = name_sweep(chosen.members, chosen.modes) if chosen.members else list(chosen.arms)
    name = "members" if chosen.members else "decode"
    rows = results.RowFile(name, KEYS, again=chosen.again, prompt=chosen.prompt, tokens=chosen.tokens)
    for model in chosen.models:
        measure(Cell(model, 1, chosen.prompt, chosen.tokens, chosen.rounds), names, rows, until)
    results.tables()
    print(rows.path)


if __name__ == "__main__":
    main()
