"""Make the golden files again: ``python -m tests.golden.make [CASE ...]``.

One may when a format or a reply is meant to change, in the same commit as the change, and with the difference of the
golden files read line by line (``git diff tests/golden``): whatever else differs in them is a fault of the change.
Files whose names end in ``_text`` or ``_page`` hold words for people; words may change freely. One may never make them
again to make a test pass.

``--written`` replaces ``written.tar.xz``, files that the product wrote earlier and must go on reading. Only a new
version of a format is a reason, and then the old archive stays next to the new one.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

import selfdoubt as package
from tests.golden import cases, gold, trained, web
from tests.golden.run import WRITTEN, folder, selfdoubt


def main(arguments: list[str]) -> None:
    """Write the golden files of the named cases, or of all."""
    if "--written" in arguments:
        write_archive()
        arguments.remove("--written")
    for case in (*cases.CASES, *trained.CASES, web.serve):
        if arguments and case.__name__ not in arguments:
            continue
        with tempfile.TemporaryDirectory() as work, folder(Path(work).resolve()):
            for name, value in case().items():
                print(gold.write(name, value))


def write_archive() -> None:
    """Let the product write two runs and several adapters, and keep them."""
    asked = ("evaluate", "--data", "questions.jsonl", "--draws", "2", "--dtype", "float32", "--states", "none")
    with tempfile.TemporaryDirectory() as work, folder(Path(work).resolve()):
        for done in (
            selfdoubt(*asked, "--out", "written/run", "--wrapper", "none"),
            selfdoubt(*asked, "--out", "written/other", "--wrapper", "vote:n_voters=2,rank=2", "--limit", "12"),
            selfdoubt("calibrate", "written/run", "--out", "written/calibrated", "--draws", "2"),
            selfdoubt("train", *trained.LORA, "--out", "lora"),
            selfdoubt("export", "lora", "written/peft", "--peft"),
        ):
            if done.code:
                sys.exit(done.err)
        for name, wrapped in trained.wrapped_mlps().items():
            package.save(wrapped, f"written/mlp/{name}", base="an-mlp", extra=trained.EXTRA)
        voters = package.vote.Wrapper(n_voters=2, rank=1, param_filter=trained.ONE_LAYER)
        lm = package.RiskAwareLM.load("pocket", wrapper=voters, dtype="float32", device="cpu")
        package.save(lm.model, "written/voters", base="pocket")
        for image in Path("written").rglob("*.png"):
            image.unlink()
        with tarfile.open(WRITTEN, "w:xz") as archive:
            archive.add("written")
    print(WRITTEN)


if __name__ == "__main__":
    main(sys.argv[1:])
