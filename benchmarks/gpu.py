"""All measurements that need a GPU, in the order of their worth, within a few minutes; a second call goes on.

    python -m benchmarks.gpu --minutes 8 --out results    # copies of all results lie in the folder, row by row
    python -m benchmarks.gpu --minutes 8 --out results    # what is there already is not measured again

Each stage is a program of its own, which writes its rows one by one; one that fails does not stop the next.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import results

#: Arms that compile nothing.
_CAPTURED = (
    "--arms hf plain plain+captured free+captured vote3 vote3+captured vote3-late+captured vote3-answer+captured "
    "sample5+captured sculpt+captured separate3"
)


class Stage(NamedTuple):
    """One measurement."""

    name: str
    minutes: float  #: most minutes that it gets
    command: tuple[str, ...]  #: arguments of Python; "--minutes" is added where ``takes_minutes``
    takes_minutes: bool = True


def build_stages(models: tuple[str, str, str], tests: str, data: Path | None = None) -> list[Stage]:
    """Return the stages, for a small, a middle and a large model.

    What compiles comes last: a compiler takes minutes before the first row.

    Args:
        models: Names of the three models.
        tests: Folder of the tests.
        data: Alpaca's records, to train on; None takes those that lie beside the repository.
    """
    small, middle, large = models

    def decode(model: str, more: str = "") -> tuple[str, ...]:
        return ("-m", "benchmarks.decode", "--models", model, "--rounds", "3", *more.split())

    def batch(more: str) -> tuple[str, ...]:
        return ("-m", "benchmarks.batch", "--models", small, "--rounds", "2", *more.split())

    def test(marks: str, *more: str) -> tuple[str, ...]:
        # A test's name is told before it runs: of a run that is cut off one sees how far it came.
        return ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", marks, *more)

    train = [
        "-m", "benchmarks.train", "--shape", middle, "--vocabularies", "128256", "--batch", "12", "--rounds", "4",
        *(["--nf4"] if importlib.util.find_spec("bitsandbytes") else []),
        *([] if data is None else ["--data", str(data)]),
    ]  # fmt: skip
    quick = "gpu and not slow"
    lm = f"{tests}/unit/lm"
    return [
        Stage(
            "tests", 2.0,
            test(quick, "-k", "not compiled", f"{tests}/gpu", f"{lm}/test_token_table.py", f"{lm}/test_doctor.py"),
            takes_minutes=False,
        ),
        Stage("decode-small", 1.5, decode(small, _CAPTURED)),
        Stage("decode-large", 1.5, decode(large, "--arms hf plain+captured vote3 vote3+captured sample5+captured")),
        Stage("batch", 1.5, batch("--batches 32 128 --arms hf plain plain+captured vote3 vote3+captured")),
        Stage("train", 2.0, tuple(train)),
        Stage("tests-train", 2.0, test(quick, f"{tests}/e2e/test_gpu_train.py"), takes_minutes=False),
        Stage("members", 1.0, decode(small, "--members 1 2 3 5 8 16 --modes captured")),
        Stage("attention", 1.0, ("-m", "benchmarks.attention", "--models", small, large)),
        Stage("decode-middle", 1.5, decode(middle, _CAPTURED)),
        Stage("contexts", 2.0, batch("--batches 1 8 --prompts 2048 8192 --arms hf plain+captured vote3+captured")),
        Stage("compiled-small", 3.0, decode(small, "--arms hf hf-static vote3+captured plain+compiled vote3+compiled")),
        Stage("compiled-large", 3.0, decode(large, "--arms hf hf-static vote3+compiled")),
        Stage("tests-compiled", 4.0, test("gpu", "-k", "compiled", tests), takes_minutes=False),
    ]  # fmt: skip


def run(stages: list[Stage], minutes: float, out: Path | None) -> list[str]:
    """Run stages one after the other, and return the names of those that ended well."""
    until, ended = time.monotonic() + 60 * minutes, []
    for stage in stages:
        left = (until - time.monotonic()) / 60
        if left < 0.25:
            print(f"{stage.name}: no time left", flush=True)
            continue
        share = min(left, stage.minutes)
        command = [sys.executable, *stage.command]
        if stage.takes_minutes:
            command += ["--minutes", f"{share:.2f}"]
        began = time.monotonic()
        try:
            # A stage that measures its own time gets some more, so that it can end by itself.
            code = subprocess.run(command, timeout=60 * min(left, share + 0.5), check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code == 0:
            ended.append(stage.name)
        print(f"{stage.name}: {'ended' if code == 0 else f'code {code}'}, {time.monotonic() - began:.0f} s", flush=True)
        if out is not None:
            copy_results(out)
    return ended


def copy_results(out: Path) -> None:
    """Copy the results of this device to a folder."""
    out.mkdir(exist_ok=True, parents=True)
    for file in results.FOLDER.glob("*-gpu-*" if torch.cuda.is_available() else "*-cpu*"):
        shutil.copy2(file, out / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=None, help="folder for copies of the results")
    parser.add_argument("--models", nargs=3, default=["1b", "3b", "8b"], metavar=("SMALL", "MIDDLE", "LARGE"))
    parser.add_argument("--tests", default="tests", help="folder of the tests to run first")
    parser.add_argument("--data", type=Path, default=None, help="Alpaca's alpaca_data.json, to train on")
    parser.add_argument("--stages", nargs="+", default=None, help="names of the stages to run; all otherwise")
    chosen = parser.parse_args()
    stages = build_stages(tuple(chosen.models), chosen.tests, chosen.data)
    if chosen.stages:
        stages = [stage for stage in stages if stage.name in chosen.stages]
    run(stages, chosen.minutes, chosen.out)


if __name__ == "__main__":
    main()
