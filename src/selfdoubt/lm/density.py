"""Fits the density of a language model: statistics of the hidden states in which its own answers' tokens are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selfdoubt import density
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.gaussian import Moments, merge
from selfdoubt.lm import defaults
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.scoring import encode_teacher_forced
from selfdoubt.lm.stepper import HFStepper

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


class _Places(NamedTuple):
    """Token ids that the model reads, and the places whose hidden states count."""

    ids: list[int]
    counts: list[bool]


def fit_density(
    lm: RiskAwareLM,
    answers: Sequence[tuple[PromptLike | None, str]],
    background: Sequence[tuple[PromptLike | None, str]] | None = None,
    *,
    wrapper: density.Wrapper | None = None,
    batch_size: int = defaults.BATCH_SIZE,
) -> None:
    """Fit the density of a language model, in place and without labels, so that its tokens have two more signals.

    ``density`` is the distance of the state in which a token was chosen from those of all tokens, the user's and the
    answers' (of the background, if one is given): it grows where a question is of another kind. ``relative_density`` is
    the distance from the states in which answers' tokens were chosen, less ``density``: it grows where an answer is
    wrong. By ``experiments/LOG.md`` neither does the other's task.

    Args:
        lm: The model. Without a density it gets one, beneath a wrapper with members; with one, that is fitted again.
        answers: Questions and the model's own answers to them, e.g. of ``generate``; None as a question for any text.
        background: Texts of any kind, with the questions that they answer or None: the distance is relative to them.
            None takes the answers and their questions; with an empty list ``density`` is the distance from answers.
        wrapper: Settings of the density; None takes the defaults.
        batch_size: Number of texts in one batch.

    Raises:
        ConfigError: If the density pools positions.
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
    if leaf.pooled:
        raise ConfigError("a language model's density is measured at each token; use density.Wrapper(pooled=False)")
    usual = _sum_features(lm, leaf, _find_places(lm, answers, whole=False), batch_size)
    texts = answers if background is None else background
    others = _find_places(lm, texts, whole=True)
    leaf.take(usual, _sum_features(lm, leaf, others, batch_size) if texts else None)


def _find_places(lm: RiskAwareLM, pairs: Sequence[tuple[PromptLike | None, str]], *, whole: bool) -> list[_Places]:
    """Return where tokens are chosen: the answer's; with ``whole`` the user's, too, but not the template's."""
    texts = []
    for text in encode_teacher_forced(lm.tokenizer, pairs, raw=False) if pairs else ():
        before = [] if text.prompt is None else text.prompt.ids
        asked = [whole and is_user for is_user in text.prompt.is_user_token] if text.prompt is not None else []
        # A token is chosen at the place before its own.
        texts.append(_Places([*before, *text.ids][:-1], [*asked, *(True for _ in text.ids)][1:]))
    return sorted((text for text in texts if any(text.counts)), key=lambda text: len(text.ids))


def _sum_features(lm: RiskAwareLM, leaf: density.MeasuredLeaf, texts: Sequence[_Places], batch_size: int) -> Moments:
    moments: Moments | None = None
    for first in range(0, len(texts), batch_size):
        for features in _read_features(lm, leaf, texts[first : first + batch_size]):
            moments = Moments.sum(features) if moments is None else merge(moments, Moments.sum(features))
    if moments is None:
        raise DataError("the texts to fit a density on have no tokens; give longer ones")
    return moments


def _read_features(
    lm: RiskAwareLM, leaf: density.MeasuredLeaf, texts: Sequence[_Places]
) -> Iterator[Float[Tensor, "n width"]]:
    """Yield the features that count, piece by piece."""
    width = max(len(text.ids) for text in texts)
    counts = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        counts[row, width - len(text.ids) :] = torch.tensor(text.counts)
    stepper = HFStepper(lm.model, start="prompt")
    for column, piece in stepper.start([text.ids for text in texts]):
        features = stepper.pick_answering(leaf.read_features())
        used = counts[:, column : column + piece.logits.shape[2]].to(features.device)
        yield features.transpose(0, 1).transpose(1, 2)[used].flatten(0, 1)
