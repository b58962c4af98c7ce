"""What a release says of itself is the same everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import selfdoubt

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_and_the_changelog_name_the_version_and_its_date() -> None:
    citation = dict(re.findall(r"^([\w-]+): (.+)$", read("CITATION.cff"), flags=re.M))
    assert citation["version"] == selfdoubt.__version__
    sections = re.findall(r"^## (.+)$", read("CHANGELOG.md"), flags=re.M)
    assert sections[:2] == ["Unreleased", f"{selfdoubt.__version__} - {citation['date-released']}"]


def test_security_names_the_supported_version() -> None:
    assert f"today {selfdoubt.__version__.rpartition('.')[0]}." in read("SECURITY.md")


def test_every_tool_of_the_developers_is_pinned() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    pinned = {line.partition("==")[0].replace("_", "-").lower() for line in read("constraints.txt").splitlines()}
    tools = {re.split(r"[<>=!\[]", wanted)[0].lower() for wanted in extras["dev"]} - {"selfdoubt"}
    assert len(tools) > 10
    assert tools <= pinned
