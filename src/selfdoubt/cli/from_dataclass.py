"""Flags of the command line from dataclasses, and dataclasses from flags.

A field with a help text in its metadata (``selfdoubt.setting.setting``) is a flag; a field that holds another dataclass
stands for the flags of that one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from selfdoubt.errors import require

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., int])


def with_flags(*configs: type, before: str | None = None, optional: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the flags of dataclasses in place of its ``**settings``.

    Args:
        *configs: The dataclasses.
        before: The command's own parameter that their flags precede in its help; None puts them last.
        optional: Flags that are not given are None, so that a config file's values can take their place.
    """

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        # Only by name: a flag with a default may precede one without.
        kept = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind is not p.VAR_KEYWORD]
        place = next((i for i, p in enumerate(kept) if p.name == before), len(kept))
        kept[place:place] = [flag for config in configs for flag in make_flags(config, optional=optional)]
        command.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in kept}
        return command

    return decorate


def make_flags(config: type, *, optional: bool = False) -> list[inspect.Parameter]:
    """Return one parameter, as typer reads it, for each described field of a dataclass."""
    return [_make_flag(name, field, kind, optional) for name, field, kind in _described(config)]


def build_config(config: type[T], values: Mapping[str, Any], **more: Any) -> T:
    """Build a dataclass from the values of its flags; ``more`` sets fields without a flag."""
    kinds = get_type_hints(config)
    given = {}
    for field in fields(config):  # type: ignore[arg-type]
        if "help" in field.metadata:
            given[field.name] = values[_parameter_name(field)]
        elif is_dataclass(kinds[field.name]) and field.name not in more:
            given[field.name] = build_config(kinds[field.name], values)
    return config(**{**given, **more})


def parse_number_or_word(text: str | int) -> str | int:
    """Return a whole number, or a text that is none as it is (the dataclass knows its words), or a default."""
    try:
        return int(text)
    except ValueError:
        return text


def _described(config: type) -> Iterator[tuple[str, Field[Any], Any]]:
    kinds = get_type_hints(config)
    for field in fields(config):
        if "help" in field.metadata:
            yield _parameter_name(field), field, kinds[field.name]
        elif is_dataclass(kinds[field.name]):
            yield from _described(kinds[field.name])


def _flag_names(field: Field[Any]) -> list[str]:
    return (field.metadata.get("flag") or f"--{field.name.replace('_', '-')}").split()


def _parameter_name(field: Field[Any]) -> str:
    """Return the name that typer gives the flag's value: unlike the field's, it is unique in a command."""
    return _flag_names(field)[0].removeprefix("--").replace("-", "_")


def _make_flag(name: str, field: Field[Any], kind: Any, optional: bool) -> inspect.Parameter:
    text, names, default = field.metadata["help"], _flag_names(field), field.default
    if optional:
        if default is not MISSING and default is not None:
            text += f" [default: {str(default).lower() if kind is bool else default}]"
        if kind is bool:
            names[0] += f"/--no-{names[0].removeprefix('--')}"
        kind, default = kind | None, None
    choices = (
        [each for each in get_args(kind) if each is not NoneType] if get_origin(kind) in (UnionType, Union) else []
    )
    parser = None
    if len(choices) > 1:  # a number or a word, which typer has no type for
        kind, parser = str | None if optional else str, parse_number_or_word
    # A name keeps typer from making up a negative flag of its own.
    option = typer.Option(
        *names,
        parser=parser,
        help=text,
        metavar=field.metadata.get("metavar"),
        show_default=not optional and default is not None,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, option],
    )
