"""Quality of a calibration, measured on answers that its head was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from selfdoubt.calibration.threshold import AccuracyGuarantee
from selfdoubt.metrics import auroc, brier, ece, log_losses


@dataclass(frozen=True)
class Quality:
    """Quality of predicted probabilities, compared with judgements."""

    answers: int
    log_loss: float  #: nats; probabilities count as at least 1e-7 away from 0 and 1
    brier: float  #: mean squared error, in [0, 1]
    auroc: float  #: chance that a right answer has a higher p_correct than a wrong one
    ece: float  #: mean distance of accuracy and p_correct in 15 bins of equal width, in [0, 1]


@dataclass(frozen=True)
class CandidateReport:
    """One kind of head: its inputs when it is fitted on all answers, and its quality on held-out answers."""

    name: str
    features: tuple[str, ...]
    state: str | None  #: "position.layer"
    inside: Quality  #: on answers of the same topics: out of fold
    outside: Quality | None  #: on answers of topics that it has not seen; None with too few topics


@dataclass(frozen=True)
class CalibrationReport:
    """Report of a calibration: how p_correct was learnt, and its quality."""

    answers: int  #: judged and usable
    left_out: Mapping[str, int]  #: number of answers by reason
    learnt_from: int  #: answers that the head was fitted on; the others test the threshold
    chosen: str
    candidates: tuple[CandidateReport, ...]  #: from the simplest to the richest
    topics: int  #: topics (or groups of them) left out in turn; 0 if there are too few
    warnings: tuple[str, ...]
    promise: AccuracyGuarantee | None  #: guarantee of the threshold; None if none was asked for or found
    refusal: str | None  #: the reason why no threshold was found
    #: p_correct of each record in its order, by a head that was fitted without it: out of fold for those the head
    #: learnt from, by the head itself for the others. None where a score is missing.
    out_of_fold: tuple[float | None, ...]
    #: By a head that was fitted without the record's topic; None for all where there are too few topics.
    out_of_topic: tuple[float | None, ...]

    def about(self) -> dict[str, Any]:
        """Return the entry ``Calibration.about``: the quality of the stored head, for people who read the file."""
        best = self.best
        return {
            "candidate": self.chosen,
            "answers": self.learnt_from,
            "inside": asdict(best.inside),
            "outside": None if best.outside is None else asdict(best.outside),
            "warnings": list(self.warnings),
        }

    @property
    def best(self) -> CandidateReport:
        """The report of the chosen candidate."""
        return next(c for c in self.candidates if c.name == self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without the single probabilities, which belong to the records."""
        entries = asdict(self)
        del entries["out_of_fold"], entries["out_of_topic"]
        return entries

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return a table of the candidates: its header, and one row per candidate; the chosen one is starred."""
        head = ["head", "reads", "log loss", "Brier", "AUROC", "ECE"]
        if self.topics:
            head += [f"{name}, other topics" for name in ("log loss", "AUROC", "ECE")]
        table = []
        for c in self.candidates:
            reads = c.features[0] if len(c.features) == 1 else f"{len(c.features)} scores"
            row = [c.name + " *" * (c.name == self.chosen), reads + (f", state {c.state}" if c.state else "")]
            row += [f"{x:.3f}" for x in (c.inside.log_loss, c.inside.brier, c.inside.auroc, c.inside.ece)]
            if self.topics and c.outside is not None:
                row += [f"{x:.3f}" for x in (c.outside.log_loss, c.outside.auroc, c.outside.ece)]
            table.append(row)
        return head, table

    def lines(self) -> list[str]:
        """Return the report as plain text, for a terminal."""
        head, table = self.rows()
        widths = [max(len(row[i]) for row in (head, *table)) for i in range(len(head))]
        lines = [f"learnt from {self.learnt_from} of {self.answers} judged answers (held-out numbers; * is chosen)"]
        if self.left_out:
            lines.append("left out: " + ", ".join(f"{n} {why}" for why, n in self.left_out.items()))
        for row in (head, *table):
            cells = [row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in range(len(row))]
            lines.append("  ".join(cells).rstrip())
        lines += [f"warning: {text}" for text in self.warnings]
        if self.promise is not None:
            p = self.promise
            lines.append(
                f"answers with p_correct >= {p.threshold:.4f} are shown: {p.right} of {p.answered} were right, "
                f"{100 * p.coverage:.1f} % of {p.answers} questions; at least {100 * p.target_accuracy:g} % are, with "
                f"{100 * p.confidence:g} % confidence, for questions drawn as these were"
            )
        elif self.refusal is not None:
            lines.append(self.refusal)
        return lines


def measure_quality(p: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> Quality:
    """Return the quality of those probabilities that are not NaN; right and wrong answers must be among them."""
    seen = ~np.isnan(p)
    p, correct = p[seen], correct[seen]
    return Quality(
        answers=len(p),
        log_loss=float(log_losses(p, correct).mean()),
        brier=brier(p, correct),
        auroc=auroc(1 - p, correct),
        ece=ece(p, correct),
    )
