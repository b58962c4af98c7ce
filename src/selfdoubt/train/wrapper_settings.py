"""The wrapper of a training run: reads its settings from flags and a config file, builds it, and writes TOML.

Nothing here imports torch until a wrapper is built, so that the command line lists its flags quickly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any, Literal

from selfdoubt.errors import ConfigError, LoadError
from selfdoubt.setting import setting
from selfdoubt.wrapper_text import parse_wrapper_text

#: Defaults of training where they are not the wrapper's.
RANK = 16
#: The methods whose setting each of ``WrapperFlags`` is.
_METHODS_OF = {
    "n_voters": ("vote",), "rank": ("vote",), "weight_noise": ("vote",), "alpha": ("vote",),
    "start": ("vote",), "param_filter": ("vote", "sample"),
    "n_samples": ("sample",), "noise": ("sample",), "n_layers": ("sculpt",),
}  # fmt: skip


@dataclass(frozen=True)
class WrapperFlags:
    """Settings of wrappers with a flag of their own; all others are in the text of ``--wrapper``."""

    wrapper: str = setting(
        "none",
        "The method that learns: LoRA alone (none), with sampling noise (sample) or with a scale branch (sculpt); or "
        "voters (vote), which a flag of theirs means, too; with settings as in 'sample:distribution=Normal(0.1, "
        "trainable=true)' or 'sculpt:rank=8'.",
    )
    n_voters: int = setting(3, "vote: number of voters.")
    rank: int = setting(RANK, "vote: rank of a deviation; 0 for full ones.")
    weight_noise: float = setting(0.2, "vote: initial size of a deviation, relative to the weights.")
    alpha: float = setting(1.0, "vote: scale of the deviations.")
    start: Literal["prompt", "answer"] = setting(
        "prompt", "vote: first token that voters read: of the prompt, or of the answer, after a prompt read once."
    )
    param_filter: str | None = setting(
        None, "vote, sample: regex over parameter names; left out, query and value projections."
    )
    n_samples: int = setting(5, "sample: passes at evaluation.")
    noise: float | None = setting(
        None, "sample: probability of dropping a feature; left out, normal noise of standard deviation 0.1."
    )
    n_layers: int = setting(2, "sculpt: layers of the scale branch.")


FLAG_NAMES = tuple(each.name for each in fields(WrapperFlags))


def choose_wrapper(values: dict[str, Any], flags: dict[str, Any], *, seed: Any) -> dict[str, Any] | None:
    """Take the wrapper's settings out of a config file's values and out of flags; a flag wins.

    Args:
        values: The file's: ``wrapper`` is a table, or a text as in ``--wrapper`` with other settings next to it.
        flags: Values of ``WrapperFlags`` that were given.
        seed: Seed of the run, for a wrapper without a seed of its own.

    Returns:
        Settings with their ``method``, or None for no wrapper.

    Raises:
        ConfigError: If the method is unknown, or a table has settings next to it.
    """
    of_file = {name: values.pop(name) for name in FLAG_NAMES if name in values}
    of_flags = {name: flags.pop(name) for name in FLAG_NAMES if name in flags}
    start = of_file.pop("wrapper") if "wrapper" in of_file else _choose_method({*of_file, *of_flags})
    if isinstance(start, Mapping) and of_file:
        raise ConfigError(f"{next(iter(of_file))} stands next to [wrapper]; put it into that table")
    table = _parse(start)
    if "wrapper" in of_flags:
        given = _parse(of_flags.pop("wrapper"))
        same = table is not None and given is not None and table["method"] == given["method"]
        table = {**table, **given} if table is not None and given is not None and same else given
    if table is None:
        return None
    for given in (of_file, of_flags):
        _overlay(table, given)
    if isinstance(seed, int):
        table.setdefault("seed", seed)
    return table


def _choose_method(settings: AbstractSet[str]) -> str:
    """Return the first method that has one of these settings; "none" without any: LoRA alone."""
    return next((_METHODS_OF[name][0] for name in _METHODS_OF if name in settings), "none")


def build_wrapper(table: Mapping[str, Any] | None) -> Any:
    """Return the wrapper of a table of settings, with the defaults of training.

    Raises:
        ConfigError: If a setting is unknown, of another kind or out of range.
    """
    if table is None:
        return None
    from selfdoubt.manifest import from_json

    settings = dict(table)
    if settings.get("method") == "vote":
        full = settings.get("finetune") is False
        settings.setdefault("rank", None if full else RANK)
    if settings.get("rank") == 0 and not isinstance(settings["rank"], bool):
        settings["rank"] = None
    try:
        return from_json(settings)
    except LoadError as error:
        raise ConfigError(str(error)) from None


def wrapper_to_toml(table: Mapping[str, Any]) -> str:
    """Return a wrapper's settings as a TOML table: a rank of None is 0, other settings of None are left out."""
    values = {name: 0 if name == "rank" and value is None else value for name, value in table.items()}
    rows = [f"{name} = {to_toml_value(value)}" for name, value in values.items() if value is not None]
    return "\n".join(["", "[wrapper]", *rows]) + "\n"


def to_toml_value(value: Any) -> str:
    """Return a value as TOML, which writes numbers, booleans and texts as JSON does."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {to_toml_value(item)}" for name, item in value.items()) + "}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _parse(start: Any) -> dict[str, Any] | None:
    """Return a table of settings from one, or from a text; None for "none"."""
    if isinstance(start, Mapping):
        return dict(start)
    if not isinstance(start, str):
        raise ConfigError(f"wrapper must be a text or a table, got {start!r}")
    parsed = parse_wrapper_text(start, "none")
    return None if isinstance(parsed, str) else parsed


def _overlay(table: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Put settings with flags of their own into a table, those that are its method's."""
    for name, value in given.items():
        if table.get("method") not in _METHODS_OF[name]:
            continue
        if name != "noise":
            table[name] = value
        elif value is not None:
            table["distribution"] = {"name": "Bernoulli", "p": value}
