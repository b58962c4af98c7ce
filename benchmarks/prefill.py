"""What reading prompts costs: with scores of the user's tokens against the model's trunk alone.

Same model, same run: the arms take turns, round by round, and a ratio is the median of the ratios within a round. Each
round is written at once, and a run that was cut off goes on where it stopped.

    python -m benchmarks.prefill [--model FOLDER] [--rounds 7] [--minutes 5]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.arms import build
from selfdoubt import vote
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.stepper import HFStepper

#: Tokens that a chat template puts before and after a question (SmolLM2's, with its system prompt).
BEFORE, AFTER = 31, 5
#: Lengths of the prompts of each case.
CASES = {"24 prompts of 60 to 120 tokens": [60 + 60 * i // 23 for i in range(24)], "1 prompt of 500 tokens": [500]}
NAMES = {
    "trunk": "the trunk alone, one pass",
    "head": "trunk and head, logits of every position",
    "floor": "trunk, and the head at the user's tokens, no scores",
    "every": "selfdoubt, no wrapper, every token scored",
    "plain": "selfdoubt, no wrapper, the user's tokens scored",
    "vote3": "vote, 3 voters of rank 16 on q and v",
}
Run = Callable[[], object]


def load(folder: str) -> tuple[str, nn.Module]:
    """Return a name, and the model of a folder in bfloat16, or one of a known shape with random weights."""
    if not folder:
        return "135m", build("135m")
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    return Path(folder).name, model


def build_arms(model: Any, lengths: Sequence[int]) -> dict[str, Run]:
    """Return functions that read the same prompts, each in its own way."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    users = [[BEFORE <= i < n - AFTER for i in range(n)] for n in lengths]
    device, width = next(model.parameters()).device, max(lengths)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    padding = torch.tensor([[0] * (width - n) + [1] * n for n in lengths], device=device)
    places = torch.tensor([[False] * (width - len(u)) + u for u in users], device=device).roll(-1, 1)
    places[:, -1] = True
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
    if min(lengths) < width:
        inputs |= {"attention_mask": padding, "position_ids": (padding.cumsum(1) - 1).clamp_min(0)}

    @torch.inference_mode()
    def trunk() -> Tensor:
        hidden: Tensor = model.model(**inputs).last_hidden_state
        return hidden

    @torch.inference_mode()
    def floor() -> object:
        hidden = trunk()[places]
        for block in torch.split(hidden, 128):
            logits = model.lm_head(block)
        return logits

    voters = vote.Wrapper(n_voters=3, rank=16)(model)
    return {
        "trunk": trunk,
        "head": torch.inference_mode()(lambda: model(**inputs).logits),
        "floor": floor,
        "every": lambda: prefill(HFStepper(model), prompts),
        "plain": lambda: prefill(HFStepper(model), prompts, scored=users),
        "vote3": lambda: prefill(HFStepper(voters), prompts, scored=users),
    }


def measure(run: Run) -> tuple[float, float]:
    """Return the seconds of one run: of the wall clock, and of all processors together."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def summarize(times: dict[str, list[tuple[float, float]]], model: str, case: str) -> list[results.Row]:
    """Return a row per arm."""
    rows = []
    for arm, spent in times.items():
        seconds = [wall for wall, _ in spent]
        low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
        ratios = [
            median(one[clock] / base[clock] for one, base in zip(spent, times["trunk"], strict=False))
            for clock in (0, 1)
        ]
        rows.append({
            "model": model, "case": case, "arm": arm, "ratio": round(ratios[0], 3),
            "processor_ratio": round(ratios[1], 3), "median": median(seconds), "spread": [low, high],
            "unit": "seconds", "times": spent,
        })  # fmt: skip
    return rows


def table(record: dict[str, Any]) -> str:
    """Return the rows of one device as Markdown."""
    lines = []
    for row in record["rows"]:
        low, high = row["spread"]
        lines.append([
            f"{row['model']}, {row['case']}: {NAMES[row['arm']]}", f"{row['median']:.2f}", f"{low:.2f}-{high:.2f}",
            f"{row['ratio']:.2f}x", f"{row['processor_ratio']:.2f}x",
        ])  # fmt: skip
    head = ["model, prompts: arm", "seconds, median", "quartiles", "to the trunk", "by processor time"]
    about = (
        f"{record['device']}; bfloat16; of each prompt {BEFORE} tokens before the user's and {AFTER} behind are the "
        f"template's; {len(record['rows'][0]['times'])} rounds; commit {record['commit']}, torch "
        f"{record['versions']['torch']}, transformers {record['versions']['transformers']}."
    )
    return results.markdown(head, lines) + "\n\n" + about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder of a model; without one, the 135M shape")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=5.0, help="time after which no round begins")
    chosen = parser.parse_args()
    ends = time.monotonic() + 60 * chosen.minutes
    name, model = load(chosen.model)
    path = results.find_path("prefill")
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": [], "commit": ""}
    rows: list[results.Row] = record["rows"]
    goes_on = record["commit"] == results.read_commit()  # rounds of another commit are another measurement
    for case, lengths in CASES.items():
        arms = build_arms(model, lengths)
        here = {row["arm"]: row["times"] for row in rows if goes_on and (row["model"], row["case"]) == (name, case)}
        times: dict[str, list[tuple[float, float]]] = {arm: [tuple(t) for t in here.get(arm, [])] for arm in arms}
        others = [row for row in rows if (row["model"], row["case"]) != (name, case)]
        if len(times["trunk"]) < chosen.rounds:
            for run in arms.values():  # warms up
                run()
        while len(times["trunk"]) < chosen.rounds and time.monotonic() < ends:
            spent = {arm: measure(run) for arm, run in arms.items()}
            for arm, seconds in spent.items():
                times[arm].append(seconds)
            rows = others + summarize(times, name, case)
            results.write("prefill", rows, lengths=CASES)
            print(case, {arm: f"{wall:.2f} s" for arm, (wall, _) in spent.items()}, flush=True)
    print(path)


if __name__ == "__main__":
    main()
