"""Quality of a calibration, measured on answers that its head was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from selfdoubt.calibration.threshold import AccuracyGuarantee
from selfdoubt.metrics import auroc, brier, ece, log_losses, prr

#: Columns of the table of heads, and the fields of ``Quality`` that they show.
QUALITY_COLUMNS = {"log loss": "log_loss", "AUROC": "auroc", "PRR": "prr", "ECE": "ece"}


@dataclass(frozen=True)
class Quality:
    """Quality of predicted probabilities, compared with judgements; of several sets, the mean over these."""

    answers: int
    log_loss: float  #: nats; probabilities count as at least 1e-7 away from 0 and 1
    brier: float  #: mean squared error, in [0, 1]
    auroc: float  #: chance that a right answer has a higher p_correct than a wrong one
    ece: float  #: mean distance of accuracy and p_correct in 15 bins of equal width, in [0, 1]
    prr: float  #: prediction rejection ratio of 1 - p_correct: 1 for the best order, 0 for a random one


@dataclass(frozen=True)
class CandidateReport:
    """One kind of head: its inputs when it is fitted on all answers, and its quality on held-out answers."""

    name: str
    features: tuple[str, ...]
    state: str | None  #: "position.layer"
    inside: Quality  #: on answers of the same sets and topics: out of fold
    outside: Quality | None  #: on answers of sets, or topics, that it has not seen; None with too few
    #: On each set by a head that has not seen it, by the set's name; empty where topics or nothing are left out.
    by_set: Mapping[str, Quality] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerableReport:
    """Report of p_answerable: how it was learnt, and its quality."""

    chosen: str
    candidates: tuple[CandidateReport, ...]  #: from the simplest to the richest
    out_of_fold: tuple[float | None, ...]  #: as ``CalibrationReport.out_of_fold``

    @property
    def best(self) -> CandidateReport:
        """The report of the chosen candidate."""
        return next(c for c in self.candidates if c.name == self.chosen)


@dataclass(frozen=True)
class CalibrationReport:
    """Report of a calibration: how p_correct was learnt, and its quality."""

    answers: int  #: judged and usable
    left_out: Mapping[str, int]  #: number of answers by reason
    learnt_from: int  #: answers that the head was fitted on; the others test the threshold
    chosen: str
    candidates: tuple[CandidateReport, ...]  #: from the simplest to the richest
    topics: int  #: topics (or groups of them) left out in turn; 0 if there are too few, or sets are left out
    sets: tuple[str, ...]  #: sets of questions left out in turn, by which the head was chosen; () for one set
    warnings: tuple[str, ...]
    promise: AccuracyGuarantee | None  #: guarantee of the threshold; None if none was asked for or found
    refusal: str | None  #: the reason why no threshold was found
    #: p_correct of each record in its order, by a head that was fitted without it: out of fold for those the head
    #: learnt from, by the head itself for the others. None where a score is missing.
    out_of_fold: tuple[float | None, ...]
    #: By a head that was fitted without the record's set or topic; None for all where there are too few.
    out_of_topic: tuple[float | None, ...]
    answerable: AnswerableReport | None = None  #: None where the records have no scores of their questions

    def about(self) -> dict[str, Any]:
        """Return the entry ``Calibration.about``: the quality of the stored head, for people who read the file."""
        best = self.best
        return {
            "candidate": self.chosen,
            "answers": self.learnt_from,
            "chosen_by": self.chosen_by,
            "sets": list(self.sets),
            **_describe(best),
            "answerable": None if self.answerable is None else _describe(self.answerable.best),
            "warnings": list(self.warnings),
        }

    @property
    def chosen_by(self) -> str:
        """The answers whose log loss chose the head: "sets" that were left out, or "folds"."""
        return "sets" if self.sets else "folds"

    @property
    def best(self) -> CandidateReport:
        """The report of the chosen candidate."""
        return next(c for c in self.candidates if c.name == self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without the single probabilities, which belong to the records."""
        entries = asdict(self)
        del entries["out_of_fold"], entries["out_of_topic"]
        if self.answerable is not None:
            del entries["answerable"]["out_of_fold"]
        return {**entries, "chosen_by": self.chosen_by}

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return a table of the candidates: its header, and one row per candidate; the chosen one is starred."""
        return self._table(self.candidates, self.chosen)

    def _table(self, candidates: Sequence[CandidateReport], chosen: str) -> tuple[list[str], list[list[str]]]:
        head = ["head", "reads", *QUALITY_COLUMNS]
        if any(c.outside is not None for c in candidates):
            head += [f"{name}, other {'sets' if self.sets else 'topics'}" for name in QUALITY_COLUMNS]
        table = []
        for c in candidates:
            reads = c.features[0] if len(c.features) == 1 else f"{len(c.features)} scores"
            row = [c.name + " *" * (c.name == chosen), reads + (f", state {c.state}" if c.state else "")]
            for quality in (c.inside, c.outside):
                row += [] if quality is None else [f"{getattr(quality, name):.3f}" for name in QUALITY_COLUMNS.values()]
            table.append(row)
        return head, table

    def lines(self) -> list[str]:
        """Return the report as plain text, for a terminal."""
        lines = [f"learnt from {self.learnt_from} of {self.answers} judged answers (held-out numbers; * is chosen)"]
        if self.left_out:
            lines.append("left out: " + ", ".join(f"{n} {why}" for why, n in self.left_out.items()))
        if self.sets:
            lines.append(
                f"chosen by the log loss on each of {len(self.sets)} sets by a head that has not seen it, so by what "
                f"transfers; numbers are means over the sets: {', '.join(self.sets)}"
            )
        else:
            lines.append("chosen by the log loss on questions like these; several runs choose by what transfers")
        lines += _align(*self.rows())
        if self.answerable is not None:
            lines.append("from the question alone, before the first token (p_answerable):")
            lines += _align(*self._table(self.answerable.candidates, self.answerable.chosen))
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


def measure_quality(
    p: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], sets: Sequence[Int[np.ndarray, "_"]] = ()
) -> Quality:
    """Return the quality of those probabilities that are not NaN; right and wrong answers must be among them.

    Args:
        p: Probability of being right, per answer.
        correct: Judgement of each.
        sets: Places of the answers of each set, to take the mean over sets; () measures all as one.
    """
    if sets:
        each = [measure_quality(p[rows], correct[rows]) for rows in sets]
        means = {f.name: float(np.mean([getattr(q, f.name) for q in each])) for f in fields(Quality)[1:]}
        return Quality(sum(q.answers for q in each), **means)
    seen = ~np.isnan(p)
    p, correct = p[seen], correct[seen]
    return Quality(
        answers=len(p),
        log_loss=float(log_losses(p, correct).mean()),
        brier=brier(p, correct),
        auroc=auroc(1 - p, correct),
        ece=ece(p, correct),
        prr=prr(1 - p, correct),
    )


def _describe(candidate: CandidateReport) -> dict[str, Any]:
    """Return the quality of a stored head."""
    return {
        "inside": asdict(candidate.inside),
        "outside": None if candidate.outside is None else asdict(candidate.outside),
        "by_set": {name: asdict(quality) for name, quality in candidate.by_set.items()},
    }


def _align(head: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of text: two columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *table)) for i in range(len(head))]
    return [
        "  ".join(row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in range(len(row))).rstrip()
        for row in (head, *table)
    ]
