"""Options of generation: checks those that callers give, and turns them into ``Sampling``."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, cast

from selfdoubt.errors import ConfigError
from selfdoubt.lm.sampling import Sampling


class Options(TypedDict, total=False):
    """Options of an answer. All may be left out, and None is the same as left out."""

    max_tokens: int  #: most tokens of an answer; 256
    temperature: float  #: 0, the default, takes the most probable token each time
    top_p: float  #: draw from the smallest set of tokens that holds this share of probability; 1
    seed: int  #: same seed, same answer, alone or in a batch; 0
    stop: Sequence[str | int]  #: texts or token ids that end an answer and are no part of it
    raw: bool  #: continue the text as it is, without the chat template; False


#: Options that ``Sampling`` has, too; the others have defaults in ``lm.defaults``.
SAMPLING: tuple[Literal["max_tokens", "temperature", "top_p"], ...] = ("max_tokens", "temperature", "top_p")
#: Names of options in other libraries, and of those that do the same here.
ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_gen_len": "max_tokens",
    "do_sample": "temperature (0 takes the most probable token)",
    "num_return_sequences": "candidates(prompt, n)",
    "n": "candidates(prompt, n)",
    "num_samples": "candidates(prompt, n)",
    "eos_token_id": "stop",
    "stop_token_ids": "stop",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "generator": "seed",
    "random_state": "seed",
    "top_k": "top_p",
    "min_p": "top_p",
}


def read_options(options: Mapping[str, Any], *further: str) -> Options:
    """Return the options that a caller gave, each of its own type; those that are None are left out.

    Args:
        options: A caller's keyword arguments.
        *further: Other parameters of the caller's function, to suggest for a misspelt option.

    Raises:
        ConfigError: If an option is unknown (the message names the nearest), or of a wrong type.
    """
    known = Options.__annotations__
    for name in options:
        if name not in known:
            raise ConfigError(f"no option is called {name!r}; {_nearest(name, [*known, *further])}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name in SAMPLING:
        if name in given:
            given[name] = read_number(name, given[name], whole=name == "max_tokens")
    if "seed" in given:
        given["seed"] = read_seed("seed", given["seed"])
    if "stop" in given:
        given["stop"] = _stops(given["stop"])
    if not isinstance(given.get("raw", False), bool):
        raise ConfigError(f"raw must be True or False, got {given['raw']!r}")
    return cast("Options", given)


def read_sampling(options: Options, stop_ids: Collection[int]) -> Sampling:
    """Return the options that say how tokens are chosen, as the token loop takes them.

    Args:
        options: Options as ``read_options`` returns them.
        stop_ids: Stop ids of the model.

    Raises:
        ConfigError: If an option is out of range.
    """
    more = {item for item in options.get("stop", ()) if isinstance(item, int)}
    given: dict[str, Any] = {name: options[name] for name in SAMPLING if name in options}
    return Sampling(**given, stop_ids=frozenset({*stop_ids, *more}))


def list_stop_texts(options: Options) -> tuple[str, ...]:
    """Return the texts among the stops.

    Raises:
        ConfigError: If one is empty.
    """
    texts = tuple(item for item in options.get("stop", ()) if isinstance(item, str))
    if "" in texts:
        raise ConfigError("a stop text must not be empty: every answer would end at once")
    return texts


def read_number(name: str, value: Any, *, whole: bool) -> int | float:
    """Return a number as Python's own type; those of numpy count, texts and truth values do not.

    Raises:
        ConfigError: If it is something else, or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real) or value != value:
        raise ConfigError(f"{name} must be a {'whole ' * whole}number, got {value!r}")
    if whole:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_seed(name: str, value: Any) -> int:
    """Return a seed as Python's own int.

    Raises:
        ConfigError: If it is not a whole number, or has more than 64 bits: no generator takes it.
    """
    seed = int(read_number(name, value, whole=True))
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"{name} must be at least -2**63 and below 2**64, got one of {seed.bit_length()} bits")
    return seed


def _nearest(name: str, known: Sequence[str]) -> str:
    if name in ELSEWHERE:
        return f"use {ELSEWHERE[name]}"
    close = get_close_matches(name.lower(), known, 1, 0.6)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def _stops(stops: Any) -> list[str | int]:
    """Return stop texts and token ids as a list; those of numpy count."""
    if isinstance(stops, str):
        raise ConfigError(f"stop is a list of texts or token ids, got the text {stops!r}; write [{stops!r}]")
    if isinstance(stops, (bytes, Mapping)) or not isinstance(stops, Iterable):
        raise ConfigError(f"stop must be a list of texts or token ids, got {stops!r}")
    items: list[str | int] = []
    for item in stops:
        if isinstance(item, bool) or not isinstance(item, (str, Integral)):
            raise ConfigError(f"stop must be a list of texts or token ids, and one of it is {item!r}")
        items.append(item if isinstance(item, str) else int(item))
    return items
