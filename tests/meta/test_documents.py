"""What the documents say is true: their Python runs, their commands run, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S)


PYTHON = [(d.name, i, code) for d in DOCUMENTS for i, code in enumerate(blocks(d, "python"))]
COMMANDS = [
    line.partition("   #")[0].strip()
    for d in DOCUMENTS
    for block in blocks(d, "sh")
    for line in block.splitlines()
    if ".venv/bin/selfdoubt" in line and "FOLDER_OR_HUB_NAME" not in line
]


@pytest.mark.parametrize(("name", "number", "code"), PYTHON, ids=[f"{n}-{i}" for n, i, _ in PYTHON])
def test_python_in_the_documents_runs(name: str, number: int, code: str) -> None:
    exec(compile(code, f"{name}, block {number}", "exec"), {"__name__": "document"})


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_documents_run(command: str) -> None:
    here = command.replace(".venv/bin/selfdoubt", f"{shlex.quote(sys.executable)} -m selfdoubt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        here, shell=True, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_constraints_hold_versions_and_nothing_else() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
