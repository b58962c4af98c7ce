"""p_correct: the calibrated probability that an answer is right, and the threshold below which it is withheld.

Learnt by ``selfdoubt calibrate``, stored in an adapter's ``selfdoubt.json``, applied here with nothing but torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from selfdoubt.errors import LoadError, NonFiniteError
from selfdoubt.fields import (
    FieldError,
    anything,
    ascending,
    choice,
    listing,
    nonempty,
    number,
    optional,
    record,
    table,
    whole,
)

Kind = Literal["isotonic", "logistic"]
Position = Literal["question", "first", "mean"]
#: Where hidden states are taken: at the question's last own token; where the answer's first token is chosen; and the
#: mean over all places where a token of the answer is chosen. Each is the mean over members.
POSITIONS: tuple[Position, ...] = ("question", "first", "mean")
#: Added to a score before its logarithm, in nats (or shares): doubts far below it all count as none. Of 1e-6 to 1e-2,
#: the square root and no transform, 1e-2 had the least log loss in the domain and outside with members' scores, whose
#: smallest values are noise.
FLOOR = 1e-2


class States(NamedTuple):
    """Hidden states after some decoder layers, one row a layer, float32 on the host."""

    layers: tuple[int, ...]  #: 0 is the first decoder layer
    question: Float[Tensor, "layers width"]
    first: Float[Tensor, "layers width"]
    mean: Float[Tensor, "layers width"]


@dataclass(frozen=True)
class StateHead:
    """A linear function of one hidden state."""

    layer: int
    position: Position
    weights: tuple[float, ...]

    def value(self, hidden: Float[Tensor, " width"]) -> float:
        """Its share of the logit.

        Raises:
            NonFiniteError: If the state is not finite.
            LoadError: If it has another width.
        """
        if len(hidden) != len(self.weights):
            raise LoadError(
                f"the calibration reads hidden states of width {len(self.weights)}, and this model's are "
                f"{len(hidden)} wide; run `selfdoubt calibrate` with this model"
            )
        found = float(hidden.double() @ torch.tensor(self.weights, dtype=torch.float64))
        if not math.isfinite(found):
            raise NonFiniteError(f"the hidden state of layer {self.layer} is not finite: p_correct needs numbers")
        return found


@dataclass(frozen=True)
class Calibration:
    """A small head: isotonic on one score, or logistic on several and on one hidden state.

    ``logistic``: p = sigmoid(bias + sum_i (linear_i * score_i + weight_i * log(max(score_i, 0) + FLOOR))
    + state.weights @ hidden), each score first clipped to its range among the calibration answers, so that a stranger
    cannot drive p beyond what was seen. Each score enters twice: its logarithm tells sure from very sure, itself
    doubtful from lost.
    ``isotonic``: p is linear between ``knots`` (score, p), and constant outside them.
    """

    kind: Kind
    features: tuple[str, ...]  #: names of answer scores
    weights: tuple[float, ...] = ()  #: of their logarithms
    linear: tuple[float, ...] = ()  #: of themselves
    bias: float = 0.0
    ranges: tuple[tuple[float, float], ...] = ()  #: of each feature among the calibration answers
    knots: tuple[tuple[float, float], ...] = ()
    state: StateHead | None = None
    threshold: float | None = None  #: least p_correct of an answer that is given; None: nothing is withheld
    promise: Mapping[str, Any] | None = None  #: target_accuracy, confidence, coverage, answers: what holds above it
    about: Mapping[str, Any] = field(default_factory=dict)  #: how it was learnt, for people

    def p_correct(self, scores: Mapping[str, float], states: States | None = None) -> float | None:
        """The probability that the answer is right, in [0, 1]; None where a score or the state is missing.

        Args:
            scores: Of an answer, by name.
            states: Of the same answer, with the layer that the head reads.

        Raises:
            NonFiniteError: If a score or the state is not a finite number.
            LoadError: If the state has another width than this was learnt for.
        """
        if any(name not in scores for name in self.features):
            return None
        bad = [name for name in self.features if not math.isfinite(scores[name])]
        if bad:
            raise NonFiniteError(f"the score {bad[0]} is {scores[bad[0]]}: p_correct needs a number")
        if self.kind == "isotonic":
            return _between(self.knots, scores[self.features[0]])
        value = self.bias
        for i, (name, (low, high)) in enumerate(zip(self.features, self.ranges, strict=True)):
            score = min(max(scores[name], low), high)
            value += self.weights[i] * transformed(score) + self.linear[i] * score
        if self.state is not None:
            if states is None or self.state.layer not in states.layers:
                return None
            value += self.state.value(getattr(states, self.state.position)[states.layers.index(self.state.layer)])
        return 1 / (1 + math.exp(-value)) if value > -700 else 0.0

    def abstains(self, p_correct: float | None) -> bool | None:
        """Whether an answer with this probability is withheld; None without a threshold."""
        return None if self.threshold is None else p_correct is None or p_correct < self.threshold

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``selfdoubt.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Calibration:
        """The calibration that ``to_json`` described.

        Raises:
            LoadError: If an entry is missing, unknown or of a wrong kind.
        """
        try:
            own = _ENTRY(entry, "calibration")
            if own["state"] is not None:
                own["state"] = StateHead(**own["state"])
            found = cls(**own)
            _check_fits(found)
        except FieldError as error:
            raise LoadError(f"the calibration cannot be read ({error}); run `selfdoubt calibrate` again") from None
        return found


_weight = number(-1e15, 1e15)  # their sums stay finite
_share = number(0, 1)
_pair = listing(_weight, 2, 2)
#: Entries of a stored calibration; those that came later than others are in the second table.
_ENTRY = record(
    {
        "kind": choice(*get_args(Kind)),
        "features": listing(nonempty, 1),
        "weights": listing(_weight),
        "linear": listing(_weight),
        "bias": _weight,
        "ranges": listing(_pair),
        "knots": listing(_pair),
        "state": optional(record({"layer": whole(), "position": choice(*POSITIONS), "weights": listing(_weight, 1)})),
        "threshold": optional(_share),
        "promise": optional(record(
            {},
            dict.fromkeys(("threshold", "target_accuracy", "confidence", "coverage", "bound"), _share)
            | dict.fromkeys(("answers", "answered", "right"), whole()),
            open_ended=True,
        )),
        "about": table(anything),
    },
    {},
)  # fmt: skip


def _check_fits(head: Calibration) -> None:
    """Check what the entries of a calibration say together.

    Raises:
        FieldError: If they do not fit.
    """
    n = len(head.features)
    lengths = {key: len(getattr(head, key)) for key in ("weights", "linear", "ranges")}
    if head.kind == "isotonic":
        lengths, n = {"features": n}, 1
        ascending([x for x, _ in head.knots], "calibration.knots")
        for i, (_, p) in enumerate(head.knots):
            _share(p, f"calibration.knots[{i}][1]")
        if head.state is not None:
            raise FieldError("calibration.state", "null in an isotonic head", "one")
    for key, length in lengths.items():
        if length != n:
            raise FieldError(f"calibration.{key}", f"a list of {n}", f"{length}")
    for i, (low, high) in enumerate(head.ranges):
        ascending([low, high], f"calibration.ranges[{i}]")


def stored(card: Mapping[str, Any]) -> Calibration | None:
    """The calibration in an adapter's card, if it has one.

    Raises:
        LoadError: If it is broken.
    """
    entry = card.get("calibration")
    return None if entry is None else Calibration.from_json(entry)


def transformed(score: float) -> float:
    """A score on a logarithmic scale, where sums over few and many tokens compare."""
    return math.log(max(score, 0.0) + FLOOR)


def _between(knots: tuple[tuple[float, float], ...], x: float) -> float:
    place = bisect_right([k[0] for k in knots], x)
    if place == 0 or place == len(knots):
        return knots[0][1] if place == 0 else knots[-1][1]
    (x0, y0), (x1, y1) = knots[place - 1], knots[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
