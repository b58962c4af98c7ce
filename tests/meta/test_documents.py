"""What the documents say is true: their Python runs, their commands run, their links lead somewhere."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from selfdoubt.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
IDS = [d.relative_to(ROOT).as_posix() for d in DOCUMENTS]
#: Most blocks of Python that may be marked ``<!-- not run: REASON -->``, in all documents.
MOST_NOT_RUN = 1


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S)


class Example(NamedTuple):
    """A block of Python: the reason why it is not run, and the error that the document shows below it."""

    code: str
    reason: str | None
    error: str | None


def examples(document: Path) -> list[Example]:
    pattern = r"(?:<!-- not run: ([^\n]+) -->\n)?```python\n(.*?)```\n(?:\n```text\n(\w+(?:Error|Warning): .*?)\n```)?"
    found = re.findall(pattern, document.read_text(encoding="utf-8"), flags=re.S)
    return [Example(code, reason or None, error or None) for reason, code, error in found]


#: Documents whose Python runs in a process of its own: Gradio leaves event loops open, which would be this test's.
APART = {ROOT / "docs" / "chat.md"}
WITH_PYTHON = [d for d in DOCUMENTS if examples(d) and d not in APART]
COMMANDS = [
    line.partition("   #")[0].strip()
    for d in DOCUMENTS
    for block in blocks(d, "sh")
    for line in block.splitlines()
    if ".venv/bin/selfdoubt" in line and "FOLDER_OR_HUB_NAME" not in line
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_python_in_the_documents_runs(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page run in order, in one namespace, as a reader pastes them."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    module = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)  # where dataclasses look
    names = module.__dict__
    for number, example in enumerate(examples(document)):
        if example.reason is not None:
            continue
        code = compile(example.code, f"{document.name}, block {number}", "exec")
        if example.error is None:
            exec(code, names)
            continue
        with pytest.raises(Exception) as error:  # noqa: PT011 (its kind and its message are compared)
            exec(code, names)
        message = f"{error.type.__name__}: {error.value}"
        shown = ".*".join(map(re.escape, example.error.split("...")))
        assert re.fullmatch(shown, message, flags=re.S), (
            f"block {number} of {document.name} shows {example.error!r}, got {message!r}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted(APART), ids=lambda d: d.relative_to(ROOT).as_posix())
def test_python_in_the_documents_runs_apart(document: Path) -> None:
    code = "\n".join(example.code for example in examples(document) if example.reason is None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert code.strip()
    assert done.returncode == 0, done.stderr


def test_few_blocks_are_not_run() -> None:
    reasons = [e.reason for d in DOCUMENTS for e in examples(d) if e.reason is not None]
    assert len(reasons) <= MOST_NOT_RUN, reasons
    assert all(len(reason) > 10 for reason in reasons)
    marks = sum(d.read_text(encoding="utf-8").count("<!-- not run") for d in DOCUMENTS)
    assert marks == len(reasons), "a mark stands before something else than a block of Python"
    assert not [d.name for d in DOCUMENTS if blocks(d, "py")], (
        "write ```python, and a mark with the reason why it is not run"
    )


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


def commands(document: Path) -> Iterator[list[str]]:
    """Words of each call of ``selfdoubt`` in the document's shell blocks, from the name of the command on."""
    for language in ("sh", "bash", "console"):
        for block in blocks(document, language):
            for line in block.replace("\\\n", " ").splitlines():
                with contextlib.suppress(ValueError):  # part of something of several lines, as a script from stdin
                    words = shlex.split(line.removeprefix("$ "), comments=True)
                    starts = [
                        i
                        for i, word in enumerate(words)
                        if word.rpartition("/")[2] == "selfdoubt" and i + 1 < len(words)
                    ]
                    yield from (words[start + 1 :] for start in starts)


CALLS = [(name, words) for name, d in zip(IDS, DOCUMENTS, strict=True) for words in commands(d)]


@pytest.mark.parametrize(("name", "words"), CALLS, ids=[f"{n}: {' '.join(w)}" for n, w in CALLS])
def test_commands_and_flags_in_the_documents_exist(name: str, words: list[str]) -> None:
    command, *rest = words
    known = typer.main.get_command(app)
    subcommands: dict[str, Any] = known.commands  # type: ignore[attr-defined]
    assert command in subcommands, f"{name}: no command is called {command!r}"
    flags = {flag for p in subcommands[command].params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
    used = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert used <= flags, f"{name}: {sorted(used - flags)} are no flags of {command}"


def test_many_commands_are_checked() -> None:
    assert len(CALLS) > 60


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", document.read_text(encoding="utf-8")):
        assert (
            target.startswith("https://")
            or leads_to_a_notebook(document, target)
            or (document.parent / target).exists()
        ), target


def leads_to_a_notebook(document: Path, target: str) -> bool:
    """The site has a page for each notebook."""
    path = document.parent / target
    return path.parent.name == "notebooks" and path.with_suffix(".ipynb").exists()


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_constraints_hold_versions_and_nothing_else() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
