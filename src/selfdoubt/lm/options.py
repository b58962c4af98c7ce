"""How to answer: what a caller may say, and what the token loop makes of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypedDict

from selfdoubt.errors import ConfigError
from selfdoubt.lm.sampling import Sampling


class Options(TypedDict, total=False):
    """How to answer. Everything may be left out."""

    max_tokens: int  #: most tokens of an answer; 256
    temperature: float  #: 0, the default, takes the most probable token each time
    top_p: float  #: draw from the smallest set of tokens that holds this share of probability; 1
    seed: int  #: same seed, same answer, alone or in a batch; 0
    stop: Sequence[str | int]  #: texts or token ids that end an answer and are no part of it
    raw: bool  #: continue the text as it is, without the chat template; False


def sampling_of(options: Options, stop_ids: Collection[int]) -> Sampling:
    """How tokens are chosen.

    Args:
        options: A caller's.
        stop_ids: The model's own.

    Raises:
        ConfigError: If an option is out of range.
    """
    own = {item for item in options.get("stop", ()) if isinstance(item, int)}
    return Sampling(
        temperature=options.get("temperature", 0.0),
        top_p=options.get("top_p", 1.0),
        max_tokens=options.get("max_tokens", 256),
        stop_ids=frozenset({*stop_ids, *own}),
    )


def stop_texts(options: Options) -> tuple[str, ...]:
    """The texts among the stops.

    Raises:
        ConfigError: If one is empty, or stops are one text instead of a list.
    """
    stops = options.get("stop", ())
    if isinstance(stops, str):
        raise ConfigError(f"stop is a list of texts or token ids, got the text {stops!r}; write [{stops!r}]")
    found = tuple(item for item in stops if isinstance(item, str))
    if "" in found:
        raise ConfigError("a stop text must not be empty: every answer would end at once")
    return found
