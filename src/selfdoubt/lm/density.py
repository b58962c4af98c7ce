"""Fits the density of a language model: statistics of the hidden states in which its own answers' tokens are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selfdoubt import density
from selfdoubt.errors import DataError
from selfdoubt.gaussian import Moments, merge
from selfdoubt.lm import defaults
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.scoring import encode_teacher_forced
from selfdoubt.lm.stepper import HFStepper

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


class _Span(NamedTuple):
    """Token ids, and the places ``[first, end)`` whose hidden states count."""

    ids: list[int]
    first: int
    end: int


def fit_density(
    lm: RiskAwareLM,
    answers: Sequence[tuple[PromptLike | None, str]],
    background: Sequence[tuple[PromptLike | None, str]] | None = None,
    *,
    wrapper: density.Wrapper | None = None,
    batch_size: int = defaults.BATCH_SIZE,
) -> None:
    """Fit the density of a language model, so that its tokens have the signal ``density``; in place, without labels.

    The usual features are those in which the tokens of the answers were chosen, the background's all of its texts'.

    Args:
        lm: The model. Without a density it gets one, beneath a wrapper with members; with one, that is fitted again.
        answers: Questions and the model's own answers to them, e.g. of ``generate``; None as a question for any text.
        background: More texts of any kind, with the questions that they answer or None; the distance is then relative
            to them. None takes the plain distance.
        wrapper: Settings of the density; None takes the defaults.
        batch_size: Number of texts in one batch.

    Raises:
        DataError: If there are too few texts for a covariance.
        PromptError: If a text or a question is empty, or too long.
        WrapError: If the model's head cannot be measured.
    """
    if not answers:
        raise DataError("a density needs the model's answers to some questions, got none")
    if density.find_measured_leaf(lm.model) is None:
        lm.replace_model(density.insert(wrapper or density.Wrapper(), lm.model).eval())
    leaf = density.find_measured_leaf(lm.model)
    assert leaf is not None
    usual = _sum_features(lm, leaf, _find_spans(lm, answers, whole=False), batch_size)
    others = None if background is None else _find_spans(lm, background, whole=True)
    leaf.take(usual, None if others is None else _sum_features(lm, leaf, others, batch_size))


def _find_spans(lm: RiskAwareLM, pairs: Sequence[tuple[PromptLike | None, str]], *, whole: bool) -> list[_Span]:
    spans = []
    for text in encode_teacher_forced(lm.tokenizer, pairs, raw=False):
        before = [] if text.prompt is None else text.prompt.ids
        # The state of the first position of all is the same in every text.
        first = 1 if whole or not before else len(before) - 1
        ids = [*before, *text.ids]
        if len(ids) - 1 > first:
            spans.append(_Span(ids[:-1], first, len(ids) - 1))
    return sorted(spans, key=lambda span: len(span.ids))


def _sum_features(lm: RiskAwareLM, leaf: density.MeasuredLeaf, spans: Sequence[_Span], batch_size: int) -> Moments:
    moments: Moments | None = None
    for first in range(0, len(spans), batch_size):
        for features in _read_features(lm, leaf, spans[first : first + batch_size]):
            moments = Moments.sum(features) if moments is None else merge(moments, Moments.sum(features))
    if moments is None:
        raise DataError("the texts to fit a density on have no tokens; give longer ones")
    return moments


def _read_features(
    lm: RiskAwareLM, leaf: density.MeasuredLeaf, spans: Sequence[_Span]
) -> Iterator[Float[Tensor, "n width"]]:
    """Yield the features that count, piece by piece."""
    width = max(len(span.ids) for span in spans)
    counts = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, span in enumerate(spans):
        pad = width - len(span.ids)
        counts[row, pad + span.first : pad + span.end] = True
    stepper = HFStepper(lm.model)
    for column, piece in stepper.start([span.ids for span in spans]):
        features = stepper.pick_answering(leaf.read_features())
        used = counts[:, column : column + piece.logits.shape[2]].to(features.device)
        yield features.transpose(0, 1).transpose(1, 2)[used].flatten(0, 1)
