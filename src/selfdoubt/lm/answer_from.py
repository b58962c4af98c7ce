"""Chooses the rows that answer: the base model, in a row of its own, or the mean over members."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn

from selfdoubt import sample, vote
from selfdoubt.errors import ConfigError
from selfdoubt.members import Wrapped
from selfdoubt.spec import Spec

AnswerFrom = Literal["base", "mean"]


def check_answer_from(answer_from: Any) -> None:
    """Check a choice of the rows that answer; None leaves it open.

    Raises:
        ConfigError: If it is something else.
    """
    if answer_from is not None and answer_from not in get_args(AnswerFrom):
        raise ConfigError(f"answer_from must be 'base' or 'mean', or left out, got {answer_from!r}")


def protect_answers(spec: Spec, answer_from: AnswerFrom | None) -> Spec:
    """Return an untrained wrapper whose answers are the base model's, unless the caller or the wrapper says otherwise.

    Args:
        spec: The wrapper. One without members, such as sculpt, answers as the base does and comes back unchanged.
        answer_from: The caller's choice, which precedes the wrapper's; None for none.

    Raises:
        ConfigError: If there is a choice, and the wrapper has no members.
    """
    if isinstance(spec, vote.Wrapper | sample.Wrapper):
        return replace(spec, answer_from=answer_from or spec.answer_from or "base")
    if answer_from is not None:
        raise _without_members(answer_from, type(spec).__module__.rpartition(".")[2])
    return spec


def set_answer_from(model: nn.Module, answer_from: AnswerFrom) -> None:
    """Let the base model answer for its voters or samples, or their mean, in place.

    Raises:
        ConfigError: If the model has neither voters nor samples.
    """
    inside = model
    while isinstance(inside, Wrapped):
        if isinstance(inside.spec, vote.Wrapper | sample.Wrapper):
            inside.spec = replace(inside.spec, answer_from=answer_from)
            return
        inside = inside.module
    raise _without_members(answer_from, "plain" if model is inside else "sculpt")


def _without_members(answer_from: str, kind: str) -> ConfigError:
    return ConfigError(
        f"answer_from={answer_from!r} chooses between the base model and the mean over voters or samples, and this "
        f"model has none ({kind}): it answers by itself; leave answer_from out, or give wrapper='vote' or 'sample'"
    )
