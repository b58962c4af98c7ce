"""What each risk is worth on real pretrained models and real questions; README's table comes from here.

    python -m benchmarks.real answer --models smollm2=FOLDER gemma=FOLDER qwen=FOLDER   # as long as it takes
    python -m benchmarks.real answer --models llama=FOLDER --device cuda --minutes 8    # goes on where it stopped
    python -m benchmarks.real rescore --models smollm2=FOLDER                           # new scores of old answers
    python -m benchmarks.real measure --adapters smollm2=FOLDER                         # the table

Arms: ``plain`` is the model as it is; ``prepared``, ``vote`` and ``sample`` are the adapters that ``selfdoubt prepare``
made of it (``--adapters smollm2=FOLDER``, in which there are ``prepared``, ``vote``, ...); ``peers`` draws ten answers
to each of fewer questions, and asks the model whether its answer is true. Models by path only: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import real_measure
from benchmarks.real_answers import SETS, AnswerFile, answer_set, parse_models, rescore_set
from selfdoubt.eval.run import choose_quarter_layers
from selfdoubt.lm.model import RiskAwareLM

#: Sets whose answers are drawn again and again.
PEER_SETS = ("webquestions", "nq")
ARMS = ("plain", "prepared", "vote", "sample", "peers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("answer", "rescore", "measure"))
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--arms", nargs="+", default=["plain"], choices=ARMS)
    parser.add_argument("--limit", type=int, default=300, help="questions of each set")
    parser.add_argument("--sampled", type=int, default=100, help="questions of each set whose answers are drawn again")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing after this time")
    parser.add_argument("--draws", type=int, default=1000)
    chosen = parser.parse_args()
    if chosen.task == "measure":
        print(real_measure.measure(chosen.runs, parse_models(chosen.adapters), chosen.draws))
        return
    until = None if chosen.minutes is None else time.monotonic() + 60 * chosen.minutes
    adapters = parse_models(chosen.adapters)
    for name, folder in parse_models(chosen.models).items():
        for arm in chosen.arms:
            lm = load(folder, adapters.get(name), arm, chosen)
            for set_name in chosen.sets:
                file = AnswerFile(chosen.runs, name, set_name, arm)
                start = time.perf_counter()
                if chosen.task == "rescore":
                    old = AnswerFile(chosen.runs, name, set_name, "plain")
                    if not old.path.is_file() or SETS[set_name].task in ("mc1", "mc2") or set_name == "trivia":
                        continue
                    rescore_set(lm, old, AnswerFile(chosen.runs, name, set_name, f"{arm}-rescored"), chosen.data, 10**9)
                    left = 0
                elif arm == "peers" and set_name not in PEER_SETS:
                    continue
                else:
                    limit = chosen.sampled if arm == "peers" else chosen.limit
                    more: dict[str, Any] = {"samples": chosen.samples, "p_true": True} if arm == "peers" else {}
                    left = answer_set(lm, file, chosen.data, limit, until=until, **more)
                print(f"{name} {set_name} {arm}: {left} left, {time.perf_counter() - start:.0f} s", flush=True)


def load(folder: str, adapters: str | None, arm: str, chosen: argparse.Namespace) -> RiskAwareLM:
    """Load a model as an arm answers with it, with hidden states of four layers where its answers are kept."""
    options: dict[str, Any] = {"dtype": chosen.dtype, "device": chosen.device}
    if arm in ("plain", "peers"):
        lm = RiskAwareLM.load(folder, wrapper=None, **options)
    elif adapters is None:
        raise SystemExit(f"the arm {arm} needs --adapters NAME=FOLDER with {arm} in it; see `selfdoubt prepare`")
    else:
        lm = RiskAwareLM.load(folder, adapter=Path(adapters) / arm, **options)
    if arm != "peers":
        lm.layers = choose_quarter_layers(lm)
    return lm


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
