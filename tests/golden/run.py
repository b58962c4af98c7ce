"""Runs of the product through its doors: the command line in this process, in a folder of the run's own."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.golden import gold

INPUTS = Path(__file__).with_name("inputs")
#: Files that the product wrote when the golden files were first made; later versions must still read them.
WRITTEN = Path(__file__).with_name("written.tar.xz")
ENVIRONMENT = {
    "COLUMNS": "120",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    def text(self) -> dict[str, Any]:
        """Return its exit code and what it printed, for people."""
        return {"code": self.code, "out": gold.text(self.out), "err": gold.text(self.err)}

    def json(self) -> dict[str, Any]:
        """Return its exit code and the JSON lines that it printed."""
        return {"code": self.code, "out": gold.lines(self.out), "err": gold.text(self.err)}


def selfdoubt(*arguments: str) -> Done:
    """Run a command in this process."""
    from selfdoubt.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["selfdoubt", *arguments]),
        mock.patch.dict(os.environ, ENVIRONMENT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def folder(work: Path) -> Iterator[Path]:
    """Go to an empty folder with the inputs in it, so that all paths are relative."""
    import torch

    shutil.copytree(INPUTS, work, dirs_exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with contextlib.chdir(work):
            yield work
    finally:
        torch.set_num_threads(threads)


def unpack_written() -> None:
    """Put the files that the product wrote earlier into the current folder."""
    with tarfile.open(WRITTEN) as archive:
        archive.extractall(filter="data")
