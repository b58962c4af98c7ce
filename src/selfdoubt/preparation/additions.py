"""Additions to a model that need no labels: untrained members that keep its answers, and a density of its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import TYPE_CHECKING

import torch

from selfdoubt import sample, vote
from selfdoubt.errors import ConfigError, DataError, WrapError
from selfdoubt.eval.prompts import BuiltPrompt
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.answer_from import protect_answers
from selfdoubt.lm.density import fit_density
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.noise_search import search_noise
from selfdoubt.members import Wrapped
from selfdoubt.spec import Spec

if TYPE_CHECKING:
    from rich.progress import Progress

#: Number of questions whose answers members must keep.
SEARCHED = 48
#: Most answers that a density is fitted on: with more, reading them takes longer than all answers took.
FITTED = 128


def check_members(spec: Spec | None) -> None:
    """Check that a wrapper has members that need no training.

    Raises:
        ConfigError: If it has none.
    """
    if spec is not None and not isinstance(spec, vote.Wrapper | sample.Wrapper):
        raise ConfigError(
            f"prepare adds vote or sample, whose members need no training, got {type(spec).__module__}; leave the "
            "wrapper out, or train it with `selfdoubt train`"
        )


def add_members(lm: RiskAwareLM, spec: Spec, prompts: Sequence[BuiltPrompt], progress: Progress) -> None:
    """Put untrained voters or samples around a model, in place, that keep its answers: the base answers.

    Noise of size "auto" gets the largest size that keeps the model's answers to ``SEARCHED`` of the prompts.

    Raises:
        ConfigError: If the model has a wrapper, or even the smallest noise changes too many answers.
    """
    if isinstance(lm.model, Wrapped):
        raise ConfigError("the model has a wrapper already, so prepare cannot add another one; leave the wrapper out")
    given = protect_answers(spec, None)
    with torch.random.fork_rng():  # fresh parameters are the same each time
        torch.manual_seed(0)
        lm.replace_model(given(lm.model).eval())  # type: ignore[operator]
    if not getattr(given, "seeks_noise", False):
        return
    task = progress.add_task("searching the noise", total=None)
    step = max(1, len(prompts) // SEARCHED)
    search_noise(lm, list(prompts[::step])[:SEARCHED], progress=lambda _: progress.advance(task))
    progress.remove_task(task)


def add_density(
    lm: RiskAwareLM, prompts: Sequence[BuiltPrompt], answers: Sequence[Answer], batch_size: int, progress: Progress
) -> list[Answer]:
    """Fit the density of a model on at most ``FITTED`` of its answers, in place, and give these its scores.

    Args:
        lm: The model.
        prompts: The prompts, longest first.
        answers: The model's answers to them.
        batch_size: Number of answers that are read at once.
        progress: Bar to show how far it is.

    Raises:
        ConfigError: If there are too few answers for a density, or the model's head cannot be measured.
    """
    task = progress.add_task("fitting the density", total=None)
    places = [i for i, answer in enumerate(answers) if answer.text.strip()]
    places = places[:: -(-len(places) // FITTED) or 1]  # of all lengths: they are in the order of their prompts'
    pairs = [(prompts[i], answers[i].text) for i in places]
    try:
        fit_density(lm, pairs, batch_size=batch_size)
    except (DataError, WrapError) as error:
        raise ConfigError(f"{error}; or prepare without a density: --no-density, density=False in Python") from None
    progress.update(task, description="measuring the density", completed=0, total=len(pairs))
    measured = list(answers)
    for first in range(0, len(pairs), batch_size):
        scored = lm.score_batch(pairs[first : first + batch_size], alternatives=0)
        for i, answer in zip(places[first : first + batch_size], scored, strict=True):
            measured[i] = _join_density(answers[i], answer)
        progress.advance(task, len(scored))
    progress.remove_task(task)
    return measured


def _join_density(answer: Answer, scored: Answer) -> Answer:
    """Return an answer with the scores that it lacked, and its tokens with a density.

    A text may be encoded otherwise than it was generated. For quantiles it is the same which token has which density.
    """
    densities = chain((token.density for token in scored.tokens), repeat(None))
    tokens = (replace(token, density=density) for token, density in zip(answer.tokens, densities, strict=False))
    return replace(answer, tokens=tuple(tokens), scores={**scored.scores, **answer.scores})
