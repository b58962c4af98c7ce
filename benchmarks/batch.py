"""What a risk costs in batches and with long prompts: tokens per second, as ``benchmarks.decode`` measures them.

python -m benchmarks.batch [--models 1b] [--batches 1 8 32 128] [--prompts 128 2048 8192] [--minutes 3]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks import arms, results
from benchmarks.decode import KEYS, Cell, measure

CPU_ARMS = ("hf", "plain", "vote3", "vote3-answer")
GPU_ARMS = ("hf", "hf-static", "plain+captured", "vote3", "vote3+captured", "vote3+compiled", "vote3-answer+captured",
            "sample5+captured")  # fmt: skip
#: Most tokens of all prompts of a batch: beyond, caches of some arms would not fit a GPU of 80 GB.
_MOST = 2**18


def table(record: dict[str, Any]) -> str:
    """Return the rows of one device as Markdown."""
    lines = []
    for row in record["rows"]:
        about = f"{row['model']}, {row['batch']} x {row['prompt']}: {arms.parse_arm(row['arm']).about}"
        if "error" in row:
            lines.append([about, row["error"][:60], "", ""])
        else:
            faster = f"{1 / row['ratio']:.2f}x" if "ratio" in row else ""
            lines.append([about, f"{row['tokens per second']:.0f}", faster, f"{row['prompt_median']:.3f}"])
    head = ["model, sequences x tokens of prompt: arm", "tokens/s", "to `generate`", "first token, s"]
    text = f"{record['device']}; bfloat16, {record['settings']['tokens']} tokens of answer; commit {record['commit']}."
    return results.markdown(head, lines) + "\n\n" + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1b"], choices=["pocket", *arms.SHAPES])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prompts", nargs="+", type=int, default=[128])
    parser.add_argument("--arms", nargs="+", default=GPU_ARMS if torch.cuda.is_available() else CPU_ARMS)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=None, help="begin no round after this time")
    parser.add_argument("--again", action="store_true", help="measure again what this commit has measured")
    chosen = parser.parse_args()
    until = None if chosen.minutes is None else time.monotonic() + 60 * chosen.minutes
    rows = results.RowFile("batch", KEYS, again=chosen.again, tokens=chosen.tokens)
    for model in chosen.models:
        for prompt in chosen.prompts:
            for batch in chosen.batches:
                if batch * prompt <= _MOST:
                    measure(Cell(model, batch, prompt, chosen.tokens, chosen.rounds), chosen.arms, rows, until)
    results.tables()
    print(rows.path)


if __name__ == "__main__":
    main()
