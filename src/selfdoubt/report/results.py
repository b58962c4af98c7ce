"""The contents of a report as frozen dataclasses, and their form in ``report.json``, written and read.

A number is an ``Estimate``: ``{"value", "low", "high"}`` with its 95 % interval; where it is not defined, ``value`` is
None and ``why`` says why. A field is stored under its own name, unless its metadata name another key, and fields are in
the order in which they are stored. Intervals are of the bootstrap over questions; those of accuracies, at a coverage
too, are Wilson's, because where all of few answers are right all resamples are equal.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from selfdoubt.errors import DataError
from selfdoubt.eval.settings import Run
from selfdoubt.metrics import Estimate

REPORT_FORMAT = 1
#: "open": the interval does not decide.
Finding = Literal["yes", "no", "open"]
#: Metadata of a field that only one form of an entry has, and that is not stored where it is None.
_IN_ONE_FORM = {"optional": True}


@dataclass(frozen=True)
class AnswerCounts:
    """Answers of a run."""

    asked: int
    judged: int
    right: int
    wrong: int
    abstained: int
    unjudged: int
    unjudged_because: Mapping[str, int]  #: answers by reason


@dataclass(frozen=True)
class Repetition:
    """Answers that repeat themselves (``repetition.is_repeating``)."""

    repeating: int
    of: int  #: all answers that are text of the model's own, not choices
    share: float  #: repeating / of
    right: int  #: answers that repeat themselves and were judged right


@dataclass(frozen=True)
class ScoreCost:
    """The price of a score, or of further tries; None where it is not known."""

    passes: float | None  #: per question
    seconds: float | None  #: for the whole run
    ratio: float | None  #: seconds, divided by those of the answers alone


@dataclass(frozen=True)
class ScoreResults:
    """Metrics of one score."""

    judged: int  #: answers that have the score
    note: str | None
    metrics: Mapping[str, Estimate]
    against: Mapping[str, Estimate]  #: "auroc" and "prr": the difference to the baseline
    cost: ScoreCost


@dataclass(frozen=True)
class BestScoreTest:
    """The best score of one half of the answers, compared with the baseline on the other half."""

    score: str | None = field(default=None, metadata=_IN_ONE_FORM)
    judged: int | None = field(default=None, metadata=_IN_ONE_FORM)  #: answers in the other half
    prr: Estimate | None = field(default=None, metadata=_IN_ONE_FORM)  #: difference in PRR to the baseline
    why: str | None = field(default=None, metadata=_IN_ONE_FORM)  #: the reason why the difference is missing


@dataclass(frozen=True)
class ConfidenceCurve:
    """Accuracy of the answers at or above each confidence percentile: 90 stands for the surest tenth."""

    confidence_percentile: tuple[float, ...] = field(metadata={"key": "percentile"})  #: 0 .. 99
    accuracy: tuple[float, ...]
    low: tuple[float, ...]  #: a pointwise band
    high: tuple[float, ...]
    riskiest_tenth: float


@dataclass(frozen=True)
class ReliabilityBin:
    """A bin of answers of like probability."""

    low: float
    high: float
    answers: int
    confidence: float  #: mean probability of the answers in the bin
    accuracy: float


@dataclass(frozen=True)
class ProbabilityResults:
    """Calibration of probabilities of being right."""

    judged: int
    bins: int  #: number of bins of the calibration error
    binning: str
    ece: Estimate
    brier: Estimate
    nll: Estimate
    reliability: tuple[ReliabilityBin, ...]  #: bins of equally many answers


@dataclass(frozen=True)
class TopicResults:
    """Metrics of one topic."""

    topic: str
    judged: int
    accuracy: Estimate
    prr: Mapping[str, Estimate]  #: by score
    coverage_at_90: Mapping[str, Estimate]
    answered: int | None  #: None where no answer was decided on
    answered_right: int


@dataclass(frozen=True)
class NoSamples:
    """The reason why further answers are not measured."""

    drawn: int  #: questions with samples
    why: str


@dataclass(frozen=True)
class UntilConfident:
    """Answering again until the risk is among the lowest."""

    percentile: float  #: at most this share of reference answers has a lower risk
    reference: str  #: in words
    reached: Estimate  #: share of questions with such a sample
    accuracy: Estimate  #: accuracy of these samples
    mean_tries: Estimate = field(metadata={"key": "tries"})
    cost: ScoreCost


@dataclass(frozen=True)
class SampleResults:
    """Accuracy of several answers per question, by the rule that picks one of them."""

    drawn: int  #: questions with samples
    questions: int  #: questions that are measured
    samples: int  #: largest number of samples of a question
    unjudged: int  #: questions left out
    one_answer: Estimate  #: accuracy of the answer that was not drawn
    least_risky: Estimate  #: accuracies, ties counting with their mean
    most_risky: Estimate
    random: Estimate
    majority: Estimate
    until_confident: UntilConfident = field(metadata={"key": "until_sure"})


@dataclass(frozen=True)
class NoAbstention:
    """The reason why no answer was decided on."""

    why: str


@dataclass(frozen=True)
class Abstention:
    """Answers that a threshold gave and abstained from."""

    threshold: float | None
    promise: Mapping[str, Any] | None  #: the calibration's guarantee, as ``AccuracyGuarantee.to_json`` writes it
    decided: int
    answered: int
    coverage: Estimate
    accuracy: Estimate  #: accuracy of the answered ones
    accuracy_abstained: Estimate = field(metadata={"key": "accuracy_withheld"})
    metrics: Mapping[str, Estimate] | None = field(default=None, metadata=_IN_ONE_FORM)  #: ``ABSTENTION_METRICS``


@dataclass(frozen=True)
class UtilityResults:
    """The worth per question at one price of a wrong answer: a right answer counts 1, an abstention 0."""

    price: float  #: in right answers
    answer_all: Estimate
    threshold: Estimate | None  #: of the run's own decisions; None if not all answers were decided on
    rule: Estimate  #: answering where p_correct > price / (1 + price)
    rule_coverage: float  #: share answered by that rule
    best: Estimate  #: at the threshold that is best on these very answers: a bound
    best_threshold: float | None  #: least p_correct that is answered there; None: nothing is
    best_coverage: float


@dataclass(frozen=True)
class Conclusion:
    """The conclusion of a report: does low risk mean right, and better than the baseline?"""

    score: str | None  #: the score that the conclusion is about
    best: str | None  #: the score with the highest PRR
    low_risk_is_right: Finding
    beats_baseline: Finding | None  #: None without a comparison
    sentences: tuple[str, ...]  #: the conclusion in words


@dataclass(frozen=True)
class Measurements:
    """All numbers of a report."""

    run: Run
    draws: int  #: number of bootstrap draws
    seed: int  #: seed of the bootstrap
    level: float  #: confidence level of the intervals
    counts: AnswerCounts
    accuracy: Estimate  #: accuracy of all judged answers
    repetition: Repetition
    baseline: str  #: the score that others are compared with
    scores: Mapping[str, ScoreResults]
    left_out: Mapping[str, str]  #: reasons by score
    best_score_test: BestScoreTest = field(metadata={"key": "picked"})
    curves: Mapping[str, ConfidenceCurve]  #: by score
    probabilities: Mapping[str, ProbabilityResults]
    topics: tuple[TopicResults, ...]
    samples: SampleResults | NoSamples
    abstention: Abstention | NoAbstention
    utilities: tuple[UtilityResults, ...] = field(default=(), kw_only=True, metadata=_IN_ONE_FORM)  #: by price


@dataclass(frozen=True)
class Report(Measurements):
    """All numbers of a report and its conclusion."""

    verdict: Conclusion

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as ``report.json`` holds it."""
        return {"format": REPORT_FORMAT, **_to_plain(self)}

    @classmethod
    def parse(cls, entries: Any) -> Report:
        """Return the report that ``to_json`` described.

        Raises:
            DataError: If it is of another format, or an entry is missing or of another kind.
        """
        if not isinstance(entries, Mapping) or entries.get("format") != REPORT_FORMAT:
            shown = entries.get("format") if isinstance(entries, Mapping) else type(entries).__name__
            raise DataError(f"a report must be an object of format {REPORT_FORMAT}, found {shown!r:.40}; report again")
        rest = {key: value for key, value in entries.items() if key != "format"}
        return cast(Report, _parse(cls, rest, "report"))


def _key(f: Any) -> str:
    return str(f.metadata.get("key", f.name))


def _to_plain(value: Any) -> Any:
    if isinstance(value, (Estimate, Run)):
        return _to_plain(value.to_json())
    if is_dataclass(value):
        values = [(f, getattr(value, f.name)) for f in fields(value)]
        return {_key(f): _to_plain(v) for f, v in values if v is not None or not f.metadata.get("optional")}
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _parse(kind: Any, value: Any, path: str) -> Any:
    """Return the value of a type as it is annotated: a dataclass, a mapping, a tuple, a union or a plain type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _parse_one_of(inner, value, path)
    if origin is Literal:
        return _check(value in inner, value, " or ".join(map(repr, inner)), path)
    if origin is tuple:
        _check(isinstance(value, list), value, "a list", path)
        return tuple(_parse(inner[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is not None:
        _check(isinstance(value, Mapping), value, "an object", path)
        return {str(key): _parse(inner[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind in (Estimate, Run):
        return kind.parse(_check(isinstance(value, Mapping), value, "an object", path))
    if is_dataclass(kind):
        _check(isinstance(value, Mapping), value, "an object", path)
        return _parse_dataclass(kind, value, path)
    if kind is Any:
        return value
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    return _check(fits, value, f"of type {kind.__name__}", path)


def _parse_one_of(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    known = [kind for kind in kinds if kind is not type(None)]
    if len(known) > 1 and isinstance(value, Mapping):  # of two dataclasses, the one with these keys
        known = [kind for kind in known if {_key(f) for f in fields(kind)} == set(value)] or known[:1]
    return _parse(known[0], value, path)


def _parse_dataclass(kind: Any, entries: Mapping[str, Any], path: str) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for f in fields(kind):
        if _key(f) in entries:
            values[f.name] = _parse(hints[f.name], entries[_key(f)], f"{path}.{_key(f)}")
        elif not f.metadata.get("optional"):
            raise DataError(f"{path}.{_key(f)} is missing; report again")
    return kind(**values)


def _check(holds: bool, value: Any, expected: str, path: str) -> Any:
    if not holds:
        raise DataError(f"{path} must be {expected}, found {value!r:.60}; report again")
    return value
