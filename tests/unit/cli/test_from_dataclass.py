"""Flags from dataclasses, and dataclasses from flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from selfdoubt.cli.from_dataclass import build_config, make_flags, with_flags
from selfdoubt.setting import setting


@dataclass(frozen=True)
class Inner:
    style: Literal["short", "long"] = setting("short", "How to write.")
    shown: bool = setting(False, "Show all.", flag="--show-all")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    n: int = setting(3, "How many.", flag="--number -n", metavar="N")
    share: float | None = setting(None, "A share.")
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needed:
    out: str = field(metadata={"help": "Where to write."})


def run(command: Any, *args: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, args)


def help_of(command: Any) -> str:
    return " ".join(run(command, "--help").output.replace("│", " ").split())


def command(configs: list[Outer], **options: Any) -> Any:
    @with_flags(Outer, **options)
    def collect(last: int = 0, **settings: Any) -> int:
        configs.append(build_config(Outer, settings) if not options.get("optional") else settings)
        return 0

    return collect


def test_each_described_field_is_a_flag_and_its_value_comes_back():
    seen: list[Outer] = []
    assert run(command(seen)).exit_code == 0
    assert run(command(seen), "-n", "5", "--style", "long", "--show-all", "--share", "0.5").exit_code == 0
    assert seen == [Outer(), Outer(Inner("long", True), 5, 0.5)]


@pytest.mark.parametrize("args", [("--style", "other"), ("--hidden", "x"), ("--no-show-all",), ("--shown",)])
def test_what_no_field_describes_is_refused(args):
    assert run(command([]), *args).exit_code == 2


def test_help_shows_text_default_and_metavar_before_the_named_parameter():
    flat = help_of(command([], before="last"))
    assert "How many." in flat
    assert "[default: 3]" in flat
    assert flat.index("--number") < flat.index("--share") < flat.index("--last")


def test_optional_flags_are_none_unless_they_are_given():
    seen: list[Any] = []
    assert run(command(seen, optional=True), "--no-show-all").exit_code == 0
    assert seen == [{"style": None, "show_all": False, "number": None, "share": None}]
    helps = [flag.annotation.__metadata__[0].help for flag in make_flags(Outer, optional=True)]
    assert helps == [
        "How to write. [default: short]",
        "Show all. [default: false]",
        "How many. [default: 3]",
        "A share.",
    ]


def test_a_field_without_a_default_must_be_given():
    assert [flag.default for flag in make_flags(Needed)] == [make_flags(Needed)[0].empty]


def test_fields_without_a_flag_come_from_the_caller():
    values = {"style": "short", "show_all": False, "number": 1, "share": None}
    assert build_config(Outer, values, hidden=("a",)).hidden == ("a",)
    assert build_config(Outer, {"number": 1, "share": None}, inner=Inner("long")).inner == Inner("long")


@dataclass(frozen=True)
class Sized:
    size: int | Literal["auto"] = setting(12, "How many, or auto.", metavar="N|auto")


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("auto", "auto"), ("many", "many")])
@pytest.mark.parametrize("optional", [False, True])
def test_a_number_or_a_word_is_read_as_what_it_is(text: str, value: Any, optional: bool) -> None:
    read: list[Any] = []

    @with_flags(Sized, optional=optional)
    def collect(**settings: Any) -> int:
        read.append(settings["size"])
        return 0

    assert run(collect, "--size", text).exit_code == 0
    assert run(collect).exit_code == 0
    assert read == [value, None if optional else 12]
    assert "N|auto" in help_of(collect)
