"""Metrics of selective answering: accuracy against coverage, and every area under it. Pure functions of numpy arrays.

Conventions, of all metrics here:

- ``risk`` grows with doubt, one finite number per answer; ``correct`` says which answers are right. Only the order of
  the risks counts. Coverage is the share of questions answered, the surest first.
- Ties share their mean accuracy, as if all orders of equal risks were taken and averaged: file order cannot matter, and
  a constant score has a flat curve. AUROC counts ties half, the same thing. A threshold cannot part ties, so
  ``coverage_at`` stops only between groups of equal risk, and AUPRC steps over whole groups.
- Unjudged answers (``None``) are taken out first and counted by ``drop_unjudged``; they are never wrong answers.
- Undefined is an error (``MetricError``), never a number: fewer than two answers, NaN or infinity, lists that do not
  fit. Where all answers are right, or all wrong, accuracies, AURC, AUARC and AUGRC are defined and kept (they then
  give the accuracy, and say nothing of the ranking); excess AURC, PRR, AUROC and AUPRC measure only the ranking: an
  error.
- "Right" is positive for accuracy, **wrong is the positive class** of AUROC and AUPRC: risk is to find errors.

``METRICS`` names all of them with the settings of a report. The metrics of ``p_correct`` come from ``calibration``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from selfdoubt.errors import ConfigError, MetricError
from selfdoubt.metrics.calibration import (
    brier,
    brier_over_draws,
    ece,
    ece_mass_over_draws,
    ece_over_draws,
    nll,
    nll_over_draws,
)
from selfdoubt.metrics.ranking import (
    ROUNDING,
    JudgementsLike,
    PerDraw,
    Ranked,
    ScoresLike,
    accuracy_at_over_draws,
    auarc_over_draws,
    auarc_trapezoid_over_draws,
    augrc_over_draws,
    auprc_over_draws,
    aurc_over_draws,
    aurc_trapezoid_over_draws,
    auroc_over_draws,
    coverage_at_over_draws,
    excess_aurc_over_draws,
    get_only_draw,
    prr_over_draws,
    rank_answers,
)

Form = Literal["sum", "trapezoid"]


class JudgedAnswers(NamedTuple):
    """The judged answers of a set, and the number of the others."""

    risk: Float[np.ndarray, "answers"]
    correct: Bool[np.ndarray, "answers"]
    n_unjudged: int  #: left out


class Curve(NamedTuple):
    """Accuracy against coverage, one point for each number of answers k = 1 .. n."""

    coverage: Float[np.ndarray, "answers"]  #: k / n, in (0, 1]
    accuracy: Float[np.ndarray, "answers"]  #: accuracy of the k surest, in [0, 1]


def drop_unjudged(risk: ScoresLike, correct: Sequence[bool | None]) -> JudgedAnswers:
    """Take out the answers without a judgement, and count them.

    Raises:
        MetricError: If there is not one risk for each judgement.

    Example:
        >>> drop_unjudged([0.1, 0.2, 0.3], [True, None, False])
        JudgedAnswers(risk=array([0.1, 0.3]), correct=array([ True, False]), n_unjudged=1)
    """
    values, verdicts = np.asarray(risk, np.float64), list(correct)
    if values.shape != (len(verdicts),):
        raise MetricError(
            f"risk and correct must be two lists of one length, got {values.size} and {len(verdicts)}; "
            "give None for an unjudged answer"
        )
    known = np.array([verdict is not None for verdict in verdicts], bool)
    right = np.array([bool(verdict) for verdict in verdicts if verdict is not None], bool)
    return JudgedAnswers(values[known], right, len(verdicts) - len(right))


def accuracy_coverage(risk: ScoresLike, correct: JudgementsLike) -> Curve:
    """Return the accuracy of the k surest answers for every k.

    It is the accuracy-rejection curve of Nadeem et al. (2009), mirrored. Its last point is the accuracy of all answers.
    One minus it is the risk-coverage curve (El-Yaniv and Wiener, 2010).

    Raises:
        MetricError: Fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> accuracy_coverage(np.array([0.1, 0.9]), np.array([True, False]))
        Curve(coverage=array([0.5, 1. ]), accuracy=array([1. , 0.5]))
    """
    r = rank_answers(risk, correct)
    each = np.repeat(np.arange(len(r.score)), r.answers[0])
    k = np.arange(1, len(each) + 1)
    right = r.right_start[0, each] + (k - r.start[0, each]) * r.mean[0, each]
    return Curve(k / len(k), right / k)


def accuracy_at(risk: ScoresLike, correct: JudgementsLike, *, coverage: float) -> float:
    """Return the accuracy of the ``ceil(coverage * n)`` surest answers, in [0, 1].

    Raises:
        ConfigError: ``coverage`` outside (0, 1].
        MetricError: Fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> accuracy_at(np.array([0.1, 0.2, 0.9]), np.array([True, True, False]), coverage=0.5)
        1.0
    """
    if not 0 < coverage <= 1:
        raise ConfigError(f"coverage must lie in (0, 1], got {coverage}; 0.35 means the surest 35 %")
    return get_only_draw(accuracy_at_over_draws(rank_answers(risk, correct), coverage))


def coverage_at(risk: ScoresLike, correct: JudgementsLike, *, accuracy: float) -> float:
    """Return the largest coverage at which the answers are right at least this often, in [0, 1]; 0 where none is.

    It stops only between groups of equal risk, where "answer if risk <= t" can stop; it may lie beyond lower
    accuracies. It describes these answers and promises nothing for later ones (``calibration.threshold`` does).

    Raises:
        ConfigError: ``accuracy`` outside [0, 1].
        MetricError: Fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> coverage_at(np.array([0.1, 0.2, 0.3, 0.9]), np.array([True, False, True, False]), accuracy=0.6)
        0.75
    """
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"accuracy must lie in [0, 1], got {accuracy}; 0.9 means 90 %")
    return get_only_draw(coverage_at_over_draws(rank_answers(risk, correct), accuracy))


def aurc(risk: ScoresLike, correct: JudgementsLike, *, form: Form = "sum") -> float:
    """Return the area under the risk-coverage curve (Geifman and El-Yaniv, 2017), in [0, 1]: 1 - ``auarc``.

    Lower is better.

    Raises:
        ConfigError: An unknown form.
        MetricError: Fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> aurc(np.array([0.1, 0.9]), np.array([True, False]))
        0.25
    """
    return 1 - auarc(risk, correct, form=form)


def auarc(risk: ScoresLike, correct: JudgementsLike, *, form: Form = "sum") -> float:
    """Return the area under the accuracy-coverage curve (Nadeem et al., 2009), in [0, 1], higher is better.

    ``sum``: the mean of the n points, (1/n) sum_k a_k. ``trapezoid``: the area between its first point, coverage 1/n,
    and 1 by the trapezoid rule, divided by 1 - 1/n, as torch-uncertainty has it. A constant score has the accuracy in
    both.

    Raises:
        ConfigError: An unknown form.
        MetricError: Fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> auarc(np.array([0.1, 0.9]), np.array([True, False]), form="trapezoid")
        0.75
    """
    if form not in ("sum", "trapezoid"):
        raise ConfigError(f'form must be "sum" or "trapezoid", got {form!r}')
    return get_only_draw(
        (auarc_over_draws if form == "sum" else auarc_trapezoid_over_draws)(rank_answers(risk, correct))
    )


def augrc(risk: ScoresLike, correct: JudgementsLike) -> float:
    """Return the area under the generalized risk-coverage curve (Traub et al., 2024), in [0, 1/2], lower is better.

    The curve is the share of all questions that are answered and answered wrong. By trapezoids from coverage 0, so that
    with accuracy a it is exactly (1 - AUROC) a (1 - a) + (1 - a)^2 / 2.

    Raises:
        MetricError: Fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> augrc(np.array([0.1, 0.9]), np.array([True, False]))
        0.125
    """
    return get_only_draw(augrc_over_draws(rank_answers(risk, correct)))


def excess_aurc(risk: ScoresLike, correct: JudgementsLike) -> float:
    """Return AURC (sum) less that of the best order of the same answers, 0 at best (Geifman, Uziel and El-Yaniv, 2019).

    Raises:
        MetricError: All right or all wrong, fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> excess_aurc(np.array([0.9, 0.1]), np.array([True, False]))
        0.5
    """
    return get_only_draw(excess_aurc_over_draws(_rank_both(risk, correct, "excess AURC")))


def prr(risk: ScoresLike, correct: JudgementsLike, *, max_rejection: float = 1.0) -> float:
    """Return the prediction rejection ratio: 1 for the best order, 0 for a random one, negative for a worse one.

    (A - A_random) / (A_best - A_random), with A the mean accuracy of the k surest over the first
    ``floor(max_rejection * n)`` rejections, k = n, n - 1, ... (Malinin and Gales, 2021; ``max_rejection=0.5``: Vashurin
    et al., 2025). On average a random order has the accuracy at every k: A_random is the accuracy, nothing is drawn.

    Raises:
        ConfigError: ``max_rejection`` outside (0, 1].
        MetricError: All right or all wrong, too few answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> prr(np.array([0.1, 0.2, 0.3, 0.9]), np.array([True, True, False, False]))
        1.0
    """
    if not 0 < max_rejection <= 1:
        raise ConfigError(f"max_rejection must lie in (0, 1], got {max_rejection}; 0.5 is usual next to 1.0")
    r = _rank_both(risk, correct, "PRR")
    if int(max_rejection * r.n[0] + ROUNDING) < 2:
        raise MetricError(
            f"PRR over the first {max_rejection:g} of {r.n[0]} rejections rejects nothing; "
            f"judge at least {int(np.ceil(2 / max_rejection))} answers or raise max_rejection"
        )
    return get_only_draw(prr_over_draws(r, max_rejection))


def auroc(risk: ScoresLike, correct: JudgementsLike) -> float:
    """Return the chance that a wrong answer has a higher risk than a right one, in [0, 1] (Hanley and McNeil, 1982).

    1/2 is chance; ties count half.

    Raises:
        MetricError: All right or all wrong, fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> auroc(np.array([0.1, 0.2, 0.9]), np.array([True, True, False]))
        1.0
    """
    return get_only_draw(auroc_over_draws(_rank_both(risk, correct, "AUROC")))


def auprc(risk: ScoresLike, correct: JudgementsLike) -> float:
    """Return the average precision of finding the **wrong** answers by their risk, in (0, 1].

    A constant score has the error rate. Sum over thresholds of (recall step) x precision, without interpolation (Davis
    and Goadrich, 2006), as scikit-learn's ``average_precision_score``.

    Raises:
        MetricError: All right or all wrong, fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> auprc(np.array([0.1, 0.2, 0.9]), np.array([True, True, False]))
        1.0
    """
    return get_only_draw(auprc_over_draws(_rank_both(risk, correct, "AUPRC")))


class Metric(NamedTuple):
    """One metric of a report."""

    function: Callable[[np.ndarray, np.ndarray], float]  #: of (risk, correct), or of (p_correct, correct)
    bigger_is_better: bool
    needs_probability: bool  #: takes ``p_correct`` instead of a risk
    over_draws: Callable[[Ranked], PerDraw]  #: the same of many resamples at once, NaN where it is not defined


def _name_shares() -> dict[str, Metric]:
    """Return accuracies at a coverage and coverages at an accuracy, by name."""
    metrics = {}
    for name, coverage in [("accuracy", 1.0), *((f"accuracy_at_{c}", c / 100) for c in (1, 8, 9, 35))]:
        fast = partial(accuracy_at_over_draws, coverage=coverage)
        metrics[name] = Metric(partial(accuracy_at, coverage=coverage), True, False, fast)
    for percent in (100, 95, 90, 80, 70):
        fast = partial(coverage_at_over_draws, accuracy=percent / 100)
        metrics[f"coverage_at_{percent}"] = Metric(partial(coverage_at, accuracy=percent / 100), True, False, fast)
    return metrics


#: Every metric by the name it has in a report.
METRICS: Mapping[str, Metric] = MappingProxyType(
    _name_shares()
    | {
        "aurc": Metric(aurc, False, False, aurc_over_draws),
        "aurc_trapezoid": Metric(partial(aurc, form="trapezoid"), False, False, aurc_trapezoid_over_draws),
        "auarc": Metric(auarc, True, False, auarc_over_draws),
        "auarc_trapezoid": Metric(partial(auarc, form="trapezoid"), True, False, auarc_trapezoid_over_draws),
        "augrc": Metric(augrc, False, False, augrc_over_draws),
        "excess_aurc": Metric(excess_aurc, False, False, excess_aurc_over_draws),
        "prr": Metric(prr, True, False, prr_over_draws),
        "prr_50": Metric(partial(prr, max_rejection=0.5), True, False, partial(prr_over_draws, max_rejection=0.5)),
        "auroc": Metric(auroc, True, False, auroc_over_draws),
        "auprc": Metric(auprc, True, False, auprc_over_draws),
        "ece": Metric(ece, False, True, ece_over_draws),
        "ece_mass": Metric(partial(ece, spacing="mass"), False, True, ece_mass_over_draws),
        "brier": Metric(brier, False, True, brier_over_draws),
        "nll": Metric(nll, False, True, nll_over_draws),
    }
)


def _rank_both(risk: ScoresLike, correct: JudgementsLike, name: str) -> Ranked:
    r = rank_answers(risk, correct)
    right, n = int(r.n_right[0]), int(r.n[0])
    if right in (0, n):
        raise MetricError(
            f"{name} compares right answers with wrong ones, got {right} right and {n - right} wrong; "
            "ask questions of which the model knows some and not all"
        )
    return r
