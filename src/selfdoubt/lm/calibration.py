"""p_correct: the calibrated probability that an answer is right, and the threshold below which the model abstains.

Learnt by ``selfdoubt calibrate``, stored in an adapter's ``selfdoubt.json``, applied here with nothing but torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfdoubt.errors import LoadError, NonFiniteError
from selfdoubt.fields import FieldError, ascending
from selfdoubt.lm.calibration_entry import CALIBRATION_ENTRY, SHARE, HeadKind
from selfdoubt.lm.conditions import Conditions, Origin
from selfdoubt.lm.hidden_states import AnswerStates, Position, StateKey
from selfdoubt.lm.scores import ANSWER_SCORES

#: A float, or an array of them.
Numbers = TypeVar("Numbers")
#: Added to a score before its logarithm, in nats (or shares), so that tiny doubts count as none. Of 1e-6 to 1e-2,
#: the square root and no transform, 1e-2 had the least log loss in the domain and outside with members' scores, whose
#: smallest values are noise.
FLOOR = 1e-2
#: How far above the highest seen score, as a share of the seen range, a score may lie; and how many times as far from
#: the mean as the farthest seen hidden state, a state. Beyond, an answer gets no number.
SCORE_SLACK, STATE_SLACK = 0.1, 1.5
#: Greatest gap to the model's own most probable answer, in nats, at which an answer has a number: half as probable.
#: (Pocket, texts given or drawn at temperature 1: up to there the number keeps its word, beyond it is too low, and of
#: right answers in other words it would be 0; see experiments/LOG.md.)
GAP_LIMIT = math.log(2)
FAR = "question or text is far from what the calibration has seen; calibrate with such questions to get a number"
NOT_OWN = "the text is not what the model itself would say; only answers near its most probable one have a number"
NO_RECORD = "the calibration has no record of how it was made, so the number may not hold here; calibrate again"
AGAIN = "run `selfdoubt calibrate` again"


class ConfidenceEstimate(NamedTuple):
    """The confidence of a calibration in one answer."""

    p_correct: float | None = None  #: in [0, 1]
    note: str | None = None  #: one line: why the number is missing, or a caveat
    abstain: bool | None = None  #: None without a threshold


@dataclass(frozen=True)
class StateHead:
    """A linear function of one hidden state."""

    layer: int
    position: Position
    weights: tuple[float, ...]
    most: float = math.inf  #: highest value among the calibration answers
    center: tuple[float, ...] = ()  #: mean of the calibration answers' states; () in files made earlier
    spread: tuple[float, ...] = ()  #: their standard deviations; () in files made earlier
    reach: float = math.inf  #: greatest distance of their states from the center

    @property
    def key(self) -> StateKey:
        """The name of the state that is read."""
        return StateKey(self.position, self.layer)

    def value(self, hidden: Float[Tensor, " width"]) -> float:
        """Return the state's contribution to the logit, at most ``most``.

        Raises:
            NonFiniteError: If the state is not finite.
            LoadError: If the state has another width than the head's weights.
        """
        if len(hidden) != len(self.weights):
            raise LoadError(
                f"the calibration reads hidden states of width {len(self.weights)}, and this model's are "
                f"{len(hidden)} wide; run `selfdoubt calibrate` with this model"
            )
        value = float(hidden.double() @ torch.tensor(self.weights, dtype=torch.float64))
        if not math.isfinite(value):
            raise NonFiniteError(f"the hidden state of layer {self.layer} is not finite: p_correct needs numbers")
        return min(value, self.most)

    def is_far(self, hidden: Float[Tensor, " width"]) -> bool:
        """Return True if a state lies far outside of those of the calibration answers."""
        if not self.center:
            return False
        center, spread = (torch.tensor(v, dtype=torch.float64) for v in (self.center, self.spread))
        varies = spread > 0
        away = (hidden.double() - center)[varies] / spread[varies]
        return bool(len(away)) and float(away.square().mean().sqrt()) > STATE_SLACK * self.reach


@dataclass(frozen=True)
class Calibration:
    """A small head: isotonic on one score, or logistic on several and on one hidden state.

    ``logistic``: p = sigmoid(bias + sum_i (linear_i * score_i + weight_i * log(max(score_i, 0) + FLOOR))
    + state.weights @ hidden), each score first clipped to its range among the calibration answers. Each score enters
    twice: its logarithm separates sure from very sure, itself doubtful from lost.
    ``isotonic``: p is linear between ``knots`` (score, p), and constant outside them.

    Scores grow with doubt. Below the seen range an answer counts as the surest that was seen; above it, where nothing
    was seen that doubtful, an answer gets no number.
    """

    kind: HeadKind
    features: tuple[str, ...]  #: names of answer scores
    weights: tuple[float, ...] = ()  #: weights of the logarithms of the scores
    linear: tuple[float, ...] = ()  #: weights of the scores themselves
    bias: float = 0.0
    ranges: tuple[tuple[float, float], ...] = ()  #: range of each feature among the calibration answers
    knots: tuple[tuple[float, float], ...] = ()  #: (score, p) of an isotonic head, ascending in the score
    state: StateHead | None = None
    threshold: float | None = None  #: least p_correct of an answered question; None: the model never abstains
    promise: Mapping[str, Any] | None = None  #: the threshold's guarantee: target_accuracy, confidence, coverage, ...
    about: Mapping[str, Any] = field(default_factory=dict)  #: quality of the fit, for people who read the file
    conditions: Conditions | None = None  #: of the calibration answers; None in files made earlier
    #: A head on the question alone, see ``estimate_answerable``; None in files made earlier.
    answerable: Calibration | None = None

    def estimate(
        self,
        scores: Mapping[str, float],
        states: AnswerStates | None,
        origin: Origin,
        finish: str,
        gaps: Sequence[float],
        misfit: str | None = None,
    ) -> ConfidenceEstimate:
        """Return the probability that an answer is right, or the reason why it is not known.

        A calibration on the model's own most probable answers holds for these alone. An answer that is less probable by
        a gap of g nats, summed over its tokens and its end, gets ``exp(-g)`` of it, and beyond ``GAP_LIMIT`` nothing.

        Args:
            scores: Scores of the answer, by name.
            states: Hidden states of the same answer, with the layer that the head reads.
            origin: The way in which the answer's tokens were chosen.
            finish: Reason of its end: "stop", "length" or "given".
            gaps: Per token, the log-probability of the most probable one in its place less its own, nats.
            misfit: Why the calibration does not fit the model, see ``misfit``; None if it does.

        Raises:
            NonFiniteError: If a score or the state is not a finite number.
            LoadError: If the state has another width than this was learnt for.
        """
        conditions = self.conditions
        note = misfit if misfit or conditions is None else conditions.refuse_answer(origin, finish, len(gaps))
        by_gap = origin.made != "choice" and (conditions is None or conditions.made == "greedy")
        gap = math.fsum((*gaps, origin.end_gap)) if by_gap else 0.0
        if note is None and gap > GAP_LIMIT:
            note = NOT_OWN
        p = None if note else self.p_correct(scores, states)
        if p is None:
            return ConfidenceEstimate(None, note or self._why_not(scores, states), self.abstains(None))
        p *= math.exp(-gap)
        return ConfidenceEstimate(p, NO_RECORD if conditions is None else None, self.abstains(p))

    def estimate_answerable(
        self, scores: Mapping[str, float], states: AnswerStates | None, origin: Origin
    ) -> float | None:
        """Return the probability, from the question alone, that the model's own answer to it is right.

        It is the same however this answer's tokens are chosen, and known before its first token. None without a head
        for it, for prompts of another form than the calibration's, and far from its questions.

        Args:
            scores: Scores of the question, by name; others may be among them.
            states: Hidden states, of which only those before the first token are read.
            origin: Form of the prompt, and the way in which its answer is made.

        Raises:
            NonFiniteError: If a score or the state is not a finite number.
            LoadError: If the state has another width than this was learnt for.
        """
        if self.answerable is None or (self.conditions is not None and self.conditions.refuse_question(origin)):
            return None
        return self.answerable.p_correct(scores, states)

    def _why_not(self, scores: Mapping[str, float], states: AnswerStates | None) -> str:
        """Return why ``p_correct`` is None."""
        lacking = [name for name in self.features if name not in scores]
        if lacking and all(name in ANSWER_SCORES and ANSWER_SCORES[name].needs_question for name in lacking):
            return "the calibration reads the question, too; give the question"
        if lacking:
            return f"the calibration reads the score {lacking[0]}, which this answer lacks"
        if self.state is not None and self._hidden(states) is None:
            return f"the calibration reads the hidden state of layer {self.state.layer}, which was not kept"
        return FAR

    def _hidden(self, states: AnswerStates | None) -> Float[Tensor, " width"] | None:
        """Return the hidden state that the head reads; None if it is missing."""
        return None if self.state is None or states is None else states.get(self.state.key)

    def _is_far(self, scores: Mapping[str, float]) -> bool:
        """Return whether a score is more doubtful than all that was seen."""
        ranges = self.ranges if self.kind == "logistic" else ((self.knots[0][0], self.knots[-1][0]),)
        return any(
            scores[name] > high + SCORE_SLACK * (high - low)
            for name, (low, high) in zip(self.features, ranges, strict=True)
        )

    def p_correct(self, scores: Mapping[str, float], states: AnswerStates | None = None) -> float | None:
        """Return the probability that an answer is right, in [0, 1], if it was made as the calibration answers were.

        None if a score or the state is missing, or lies far outside of the seen range on the doubtful side.

        Args:
            scores: Scores of an answer, by name.
            states: Hidden states of the same answer, with the layer that the head reads.

        Raises:
            NonFiniteError: If a score or the state is not a finite number.
            LoadError: If the state has another width than this was learnt for.
        """
        if any(name not in scores for name in self.features):
            return None
        bad = [name for name in self.features if not math.isfinite(scores[name])]
        if bad:
            raise NonFiniteError(f"the score {bad[0]} is {scores[bad[0]]}: p_correct needs a number")
        hidden = self._hidden(states)
        if self._is_far(scores) or (self.state is not None and hidden is None):
            return None
        if self.kind == "isotonic":
            return _between(self.knots, scores[self.features[0]])
        clipped = [
            min(max(scores[name], low), high) for name, (low, high) in zip(self.features, self.ranges, strict=True)
        ]
        share = 0.0
        if self.state is not None and hidden is not None:
            share = self.state.value(hidden)
            if self.state.is_far(hidden):
                return None
        value = self.logit(clipped, [transform_score(score) for score in clipped], share)
        return 1 / (1 + math.exp(-value)) if value > -700 else 0.0

    def logit(self, scores: Sequence[Numbers], logs: Sequence[Numbers], share: Numbers | float) -> Numbers:
        """Return the logit of p_correct of a logistic head, for one answer (floats) or for many (arrays).

        Args:
            scores: Score of each feature, clipped to its range.
            logs: The same scores on the logarithmic scale of ``transform_score``.
            share: Contribution of the hidden state, see ``StateHead.value``; 0 without one.
        """
        value: Any = self.bias
        features: Any = zip(self.weights, self.linear, scores, logs, strict=True)
        for weight, linear, score, log in features:
            value = value + (weight * log + linear * score)
        logit: Numbers = value + share
        return logit

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers whose hidden states it reads."""
        layers = () if self.state is None else (self.state.layer,)
        return layers if self.answerable is None else (*layers, *self.answerable.layers)

    def misfit(self, model: nn.Module) -> str | None:
        """Return why answers of this model have no p_correct; None if the model is the calibrated one."""
        return None if self.conditions is None else self.conditions.refuse_model(model)

    def abstains(self, p_correct: float | None) -> bool | None:
        """Return True if the model abstains from an answer with this probability; None without a threshold."""
        return None if self.threshold is None else p_correct is None or p_correct < self.threshold

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``selfdoubt.json``."""
        state = None
        if self.state is not None:  # infinite limits are left out: JSON has no infinity
            state = {k: v for k, v in asdict(self.state).items() if v not in (math.inf, ())}
        entries = {**asdict(self), "state": state, "conditions": self.conditions and self.conditions.to_json()}
        del entries["answerable"]
        return entries if self.answerable is None else {**entries, "answerable": self.answerable.to_json()}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Calibration:
        """Return the calibration that ``to_json`` described.

        Raises:
            LoadError: If an entry is missing, unknown or of a wrong kind.
        """
        try:
            fields = CALIBRATION_ENTRY(entry, "calibration")
            if fields["state"] is not None:
                fields["state"] = StateHead(**fields["state"])
            if fields.get("conditions") is not None:
                fields["conditions"] = Conditions(**fields["conditions"])
            if fields.get("answerable") is not None:
                fields["answerable"] = cls.from_json(fields["answerable"])
            calibration = cls(**fields)
            _check_fits(calibration)
        except FieldError as error:
            raise LoadError(f"the calibration cannot be read ({error}); {AGAIN}") from None
        return calibration


def _check_fits(head: Calibration) -> None:
    """Raise ``FieldError`` where the entries of a calibration do not fit together."""
    n = len(head.features)
    lengths = {key: len(getattr(head, key)) for key in ("weights", "linear", "ranges")}
    if head.kind == "isotonic":
        lengths, n = {"features": n}, 1
        ascending([x for x, _ in head.knots], "calibration.knots")
        for i, (_, p) in enumerate(head.knots):
            SHARE(p, f"calibration.knots[{i}][1]")
        if head.state is not None:
            raise FieldError("calibration.state", "null in an isotonic head", "one")
    if head.state is not None:
        width = len(head.state.weights)
        for key in ("center", "spread"):
            if len(getattr(head.state, key)) not in (0, width) or len(head.state.center) != len(head.state.spread):
                raise FieldError(f"calibration.state.{key}", f"a list of {width}, as the weights are", "another")
    for key, length in lengths.items():
        if length != n:
            raise FieldError(f"calibration.{key}", f"a list of {n}", f"{length}")
    for i, (low, high) in enumerate(head.ranges):
        ascending([low, high], f"calibration.ranges[{i}]")


def read_calibration(manifest: Mapping[str, Any]) -> Calibration | None:
    """Return the calibration in an adapter's manifest, if it has one.

    Raises:
        LoadError: If it is broken.
    """
    entry = manifest.get("calibration")
    return None if entry is None else Calibration.from_json(entry)


def transform_score(score: float) -> float:
    """Return the logarithm of a score plus ``FLOOR``, a scale on which sums over few and many tokens compare."""
    return math.log(max(score, 0.0) + FLOOR)


def _between(knots: tuple[tuple[float, float], ...], x: float) -> float:
    place = bisect_right([k[0] for k in knots], x)
    if place == 0 or place == len(knots):
        return knots[0][1] if place == 0 else knots[-1][1]
    (x0, y0), (x1, y1) = knots[place - 1], knots[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
