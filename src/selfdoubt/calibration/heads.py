"""Fits the small heads behind p_correct, and chooses their inputs by nested cross-validation.

Isotonic regression (Zadrozny and Elkan, 2002, "Transforming classifier scores into accurate multiclass probability
estimates") on one score; logistic regression (Platt, 1999) on several and, with an L2 penalty of its own, on one hidden
state. Standardisation happens inside and is folded into the weights, so that a head reads raw scores and states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from selfdoubt.errors import require
from selfdoubt.lm.calibration import FLOOR, Calibration, StateHead
from selfdoubt.lm.hidden_states import Position, StateKey
from selfdoubt.metrics import log_losses

#: Inverse strengths of the penalty on standardised scores (scikit-learn's C).
SCORE_C = (0.01, 0.1, 1.0)
#: Sizes of a whole standardised hidden state relative to one standardised score, at any width. (SmolLM2's answers to
#: WebQuestions need 4 to 8; 2 and less lose .02 AUROC. See experiments/LOG.md.)
STATE_SIZES = (0.5, 2.0, 4.0, 8.0, 16.0)
#: Position that is read unless another one is better by more than one standard error. (SmolLM2, 1,000 answers to
#: WebQuestions and to NQ: its state is best like these and from one set to the other; see experiments/LOG.md.)
PREFERRED: Position = "mean"
#: At this size layers and positions are compared, by their first principal components: the ranking is the same.
USUAL_SIZE = 4.0
FIRST_COMPONENTS = 64
#: Number of principal components to which states are cut while a head is fitted; the penalty all but silences the rest.
#: They keep their variances: whitened ones, at their best number, are no better than these at any.
COMPONENTS = 256
INNER_FOLDS = 3
#: Least number of right and of wrong answers among those that a head learns from.
LEAST_OF_CLASS = 5

Fit = Callable[["Answers", int], Calibration]
RowIndices = Int[np.ndarray, "_"]  #: places of some answers
Probabilities = Float[np.ndarray, " answers"]


@dataclass(frozen=True, eq=False)
class CalibrationAnswers:
    """Judged answers as arrays, one row per answer."""

    names: tuple[str, ...]  #: names of the scores; each score varies
    scores: Float[np.ndarray, "answers scores"]
    states: Mapping[str, Float[np.ndarray, "answers width"]]  #: by "position.layer"
    correct: Bool[np.ndarray, " answers"]
    questions: Int[np.ndarray, " answers"]  #: equal where the question is the same
    sets: Int[np.ndarray, " answers"] | None = None  #: number of its set of questions; None where all are of one

    def __len__(self) -> int:
        return len(self.correct)

    def at(self, rows: RowIndices | Bool[np.ndarray, " answers"]) -> CalibrationAnswers:
        """Return the answers of these rows."""
        states = {key: values[rows] for key, values in self.states.items()}
        sets = None if self.sets is None else self.sets[rows]
        return CalibrationAnswers(self.names, self.scores[rows], states, self.correct[rows], self.questions[rows], sets)

    def columns(self, names: Sequence[str]) -> Float[np.ndarray, "answers some"]:
        """Return the scores of these names, one column each."""
        return self.scores[:, [self.names.index(name) for name in names]]

    @cached_property
    def classes(self) -> tuple[int, int]:
        """Numbers of questions with a wrong answer, and with a right one."""
        return len(set(self.questions[~self.correct])), len(set(self.questions[self.correct]))


def split_folds(answers: CalibrationAnswers, n: int, seed: int) -> list[RowIndices]:
    """Return the rows of up to ``n`` folds: equal questions in one, right and wrong answers spread evenly over all.

    Questions are dealt in turn: first those with wrong answers only, then the mixed, then those with right ones only.
    So with at least n questions of a class every fold has one, and with two every fold's rest has one.
    """
    n = max(2, min(n, *answers.classes))
    unique, place = np.unique(answers.questions, return_inverse=True)
    right = np.bincount(place, answers.correct) / np.bincount(place)
    kind = np.where(right == 0, 0, np.where(right == 1, 2, 1))
    order = np.lexsort((np.random.default_rng(seed).permutation(len(unique)), kind))
    fold = np.empty(len(unique), int)
    fold[order] = np.arange(len(unique)) % n
    return [np.flatnonzero(fold[place] == i) for i in range(n)]


def list_sets(answers: CalibrationAnswers) -> list[RowIndices]:
    """Return the rows of each set of questions that can be left out; none where fewer than two can.

    Right and wrong answers must be in it, and among those that then remain.
    """
    if answers.sets is None:
        return []
    rows_of_sets = [np.flatnonzero(answers.sets == i) for i in np.unique(answers.sets)]
    usable = [
        rows
        for (rest, _), rows in zip(leave_each_out(answers, rows_of_sets), rows_of_sets, strict=True)
        if min(*rest.classes, *answers.at(rows).classes) >= LEAST_OF_CLASS
    ]
    return usable if len(usable) > 1 else []


def split_inside(answers: CalibrationAnswers, seed: int) -> list[RowIndices]:
    """Return the rows that are left out in turn to choose what a head reads: each set of questions, else few folds.

    So of several sets the choice is of what transfers. There are none where a class has fewer than two questions.
    """
    if min(answers.classes) < 2:
        return []
    return list_sets(answers) or split_folds(answers, INNER_FOLDS, seed)


def leave_each_out(
    answers: CalibrationAnswers, groups: Sequence[RowIndices]
) -> Iterator[tuple[CalibrationAnswers, RowIndices]]:
    """Yield per group the answers to questions outside of it, and the group's rows."""
    for rows in groups:
        yield answers.at(~np.isin(answers.questions, answers.questions[rows])), rows


def predict_held_out(answers: CalibrationAnswers, groups: Sequence[RowIndices], fit: Fit, seed: int) -> Probabilities:
    """Return p_correct of each answer by a head that was fitted without its group; NaN for an answer in no group."""
    p_correct = np.full(len(answers), np.nan)
    for rest, rows in leave_each_out(answers, groups):
        p_correct[rows] = predict(fit(rest, seed), answers.at(rows))
    return p_correct


def predict(head: Calibration, answers: CalibrationAnswers) -> Probabilities:
    """Return ``Calibration.p_correct`` of many answers at once; scores outside the seen range are clipped to it."""
    scores = answers.columns(head.features)
    if head.kind == "isotonic":
        x, y = np.array(head.knots).T
        return np.asarray(np.interp(scores[:, 0], x, y))
    low, high = np.array(head.ranges).reshape(-1, 2).T
    logs, linear = np.hsplit(_twice(np.clip(scores, low, high)), 2)
    share = np.zeros(len(scores))
    if head.state is not None:
        hidden = answers.states[str(head.state.key)]
        share = np.minimum(hidden.astype(np.float64) @ np.array(head.state.weights), head.state.most)
    return np.asarray(require("scipy.special", "qa").expit(head.logit([*linear.T], [*logs.T], share)))


def fit_one_score(answers: CalibrationAnswers, seed: int, names: Sequence[str]) -> Calibration:
    """Fit isotonic regression on the score with the least held-out log loss; with too few answers, on the first."""
    inner = split_inside(answers, seed) if len(names) > 1 else []
    best, least = names[0], np.inf
    for name in names if inner else ():
        p = predict_held_out(answers, inner, lambda rest, _, name=name: fit_isotonic(rest, name), seed)  # type: ignore[misc]
        loss = mean_over(log_losses(p, answers.correct), inner)
        if loss < least - 1e-12:
            best, least = name, loss
    return fit_isotonic(answers, best)


def mean_over(values: Float[np.ndarray, " answers"], groups: Sequence[RowIndices]) -> float:
    """Return the mean over groups of the mean of their values."""
    return float(np.mean([values[rows].mean() for rows in groups]))


def fit_isotonic(answers: CalibrationAnswers, name: str) -> Calibration:
    """Fit isotonic regression: p falls as the score grows.

    One wrong answer is added at the surest end, and one right answer at the other. So p is never 0 or 1, where a
    single surprise would cost an infinite loss.
    """
    x = answers.columns([name])[:, 0]
    x, y = np.append(x, [x.min(), x.max()]), np.append(answers.correct, [False, True]).astype(float)
    curve = require("sklearn.isotonic", "qa").IsotonicRegression(increasing=False, y_min=0, y_max=1).fit(x, y)
    knots = zip(curve.X_thresholds_.tolist(), curve.y_thresholds_.tolist(), strict=True)
    return Calibration("isotonic", (name,), knots=tuple(knots))


def fit_logistic(answers: CalibrationAnswers, seed: int, names: Sequence[str], keys: Sequence[str] = ()) -> Calibration:
    """Fit logistic regression on scores, and on the best of some hidden states.

    Strength of the penalty on scores, the state and the strength of its own penalty are chosen in this order by
    held-out log loss (``split_inside``). Standardisation and principal components, which look at no judgement, are made
    once for all inner folds.
    """
    raw = answers.columns(names)
    scores = _Standard(_twice(raw))
    inner = split_inside(answers, seed)

    def losses_of(design: Float[np.ndarray, "answers columns"], c: float) -> Probabilities:
        losses = np.full(len(answers), np.nan)
        for rows in inner:
            rest = ~np.isin(answers.questions, answers.questions[rows])
            p = _learner(c).fit(design[rest], answers.correct[rest]).predict_proba(design[rows])[:, 1]
            losses[rows] = log_losses(p, answers.correct[rows])
        return losses

    def loss(design: Float[np.ndarray, "answers columns"], c: float) -> float:
        return mean_over(losses_of(design, c), inner)

    def build_design(state: _Standard, size: float) -> Float[np.ndarray, "answers columns"]:
        return np.hstack([scores.values, state.values * (size / np.sqrt(state.width))])

    strength = min(SCORE_C, key=lambda c: loss(scores.values, c)) if inner else SCORE_C[1]
    design, blocks, key = scores.values, [(scores, 1.0)], ""
    if keys:
        key, size = keys[0], STATE_SIZES[0]
        if len(keys) > 1 and inner:
            small = {k: _Standard(answers.states[k], FIRST_COMPONENTS, seed) for k in keys}
            tried = {k: losses_of(build_design(small[k], USUAL_SIZE), strength) for k in keys}
            key = _choose_state(tried, inner)
        state = _Standard(answers.states[key], COMPONENTS, seed)
        if inner:
            size = min(STATE_SIZES, key=lambda s: loss(build_design(state, s), strength))
        design = build_design(state, size)
        blocks.append((state, size / np.sqrt(state.width)))

    learner = _learner(strength).fit(design, answers.correct)
    weights, bias = [], float(learner.intercept_[0])
    for (block, scale), w in zip(blocks, np.split(learner.coef_[0], [scores.values.shape[1]]), strict=False):
        raw_weights = block.raw(w * scale)
        bias -= float(raw_weights @ block.mean)
        weights.append(tuple(raw_weights.tolist()))
    head = None
    if key:
        chosen = StateKey.parse(key)
        state, values = blocks[1][0], answers.states[key].astype(np.float64) @ np.array(weights[1])
        spread = np.divide(1, state.scale, out=np.zeros(len(state.scale)), where=state.scale > 0)
        center, width = (tuple(float(f"{v:.6g}") for v in row) for row in (state.mean, spread))
        head = StateHead(chosen.layer, chosen.position, weights[1], float(values.max()), center, width, state.reach)
    ranges = tuple(zip(raw.min(0).tolist(), raw.max(0).tolist(), strict=True))
    logs, linear = weights[0][: len(names)], weights[0][len(names) :]
    return Calibration("logistic", tuple(names), logs, linear, bias, ranges, state=head)


def _choose_state(losses: Mapping[str, Probabilities], inner: Sequence[RowIndices]) -> str:
    """Choose the state of least loss, or the best of the preferred position within one standard error of it."""
    best = min(losses, key=lambda key: mean_over(losses[key], inner))
    preferred = [key for key in losses if StateKey.parse(key).position == PREFERRED]
    first = min(preferred, key=lambda key: mean_over(losses[key], inner), default=best)
    seen = np.unique(np.concatenate(inner))
    return first if is_within_one_error(losses[first][seen], losses[best][seen]) else best


def _learner(c: float) -> Any:
    logistic = require("sklearn.linear_model", "qa").LogisticRegression
    return logistic(C=c, solver="newton-cholesky", tol=1e-4, max_iter=200)


def is_within_one_error(loss: Probabilities, best: Probabilities) -> bool:
    """Return whether the mean loss exceeds the best one by at most one standard error of the paired difference."""
    gap = loss - best
    return bool(gap.mean() <= gap.std(ddof=1) / np.sqrt(len(gap)) if len(gap) > 1 else gap.mean() <= 0)


class _Standard:
    """Columns with mean 0 and variance 1 (constant ones get 0), or the first principal components of these."""

    def __init__(self, raw: Float[np.ndarray, "answers columns"], components: int = 0, seed: int = 0) -> None:
        raw = raw.astype(np.float64)
        self.width = raw.shape[1]
        self.mean = raw.mean(0)
        spread = raw.std(0)
        varies = spread > 1e-6 * np.maximum(np.abs(self.mean), spread.max(initial=0) * 1e-3)
        self.scale = np.where(varies, 1 / np.where(varies, spread, 1), 0)
        self.values = (raw - self.mean) * self.scale
        #: Greatest distance of a row from the mean: the root mean square of its columns that vary.
        self.reach = float(np.sqrt(np.square(self.values).sum(1).max(initial=0) / max(1, varies.sum())))
        self._back: Any = None
        if components:
            svd = require("sklearn.utils.extmath", "qa").randomized_svd
            _, _, self._back = svd(self.values, min(components, *raw.shape), random_state=seed)
            self.values = self.values @ self._back.T

    def raw(self, weights: Float[np.ndarray, " some"]) -> Float[np.ndarray, " columns"]:
        """Weights of the raw columns that do the same as these of ``values``."""
        return np.asarray((weights if self._back is None else weights @ self._back) * self.scale)


def _twice(scores: Float[np.ndarray, "answers some"]) -> Float[np.ndarray, "answers twice"]:
    """Return the logarithms of scores, as ``calibration.transform_score``, and the scores themselves."""
    return np.hstack([np.log(np.maximum(scores, 0) + FLOOR), scores])
