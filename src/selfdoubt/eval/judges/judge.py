"""Judges all answers of a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from selfdoubt.eval.external import UNKNOWN
from selfdoubt.eval.judges.llm import LLMJudge
from selfdoubt.eval.judges.rules import needs_answers
from selfdoubt.eval.judges.verdict import Judge, Verdict
from selfdoubt.eval.records import Question, Record


def judge_records(
    records: Sequence[Record], judge: Judge, *, unknown: Collection[str] = (), only_open: bool = False
) -> list[Record]:
    """Return records with a verdict on each answer, and on each sample.

    Multiple-choice answers that were judged by their log-probabilities keep their verdict.

    Args:
        records: All records of the run.
        judge: The judge.
        unknown: Ids of questions without a known right answer: a judge that needs one leaves them unjudged.
        only_open: Keep verdicts that exist; judge the other records only.
    """
    bare = set(unknown) if needs_answers(judge) else set()
    asked = [r for r in records if not _keeps(r, only_open) and r.question.id not in bare]
    questions = {(r.question.id, text): r.question for r in asked for text in _texts(r)}
    pairs = [(question, text) for (_, text), question in questions.items()]
    verdicts = dict(zip(questions, _verdicts(judge, pairs), strict=True))
    judged = []
    for record in records:
        if _keeps(record, only_open):
            judged.append(record)
            continue
        if record.question.id in bare:
            judged.append(replace(record, correct=None, grade=None, note=record.note or UNKNOWN))
            continue
        verdict = verdicts[record.question.id, record.answer]
        samples = tuple(replace(s, correct=verdicts[record.question.id, s.text].correct) for s in record.samples)
        note = verdict.note if record.note is None else record.note
        judged.append(replace(record, correct=verdict.correct, grade=verdict.grade, note=note, samples=samples))
    return judged


def _keeps(record: Record, only_open: bool) -> bool:
    return record.correct is not None and (only_open or bool(record.question.choices))


def _texts(record: Record) -> list[str | None]:
    return [record.answer, *(s.text for s in record.samples)]


def _verdicts(judge: Judge, pairs: Sequence[tuple[Question, str | None]]) -> list[Verdict]:
    if isinstance(judge, LLMJudge):
        return judge.verdicts(pairs)
    return [judge(question, text) for question, text in pairs]
