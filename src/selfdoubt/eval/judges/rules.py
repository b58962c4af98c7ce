"""Rules that judge an answer, one frozen dataclass each; calling one with question and answer gives a ``Verdict``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from selfdoubt.errors import ConfigError, require
from selfdoubt.eval.judges.choices import Choice
from selfdoubt.eval.judges.signs import find_spans, say_signs
from selfdoubt.eval.judges.text import (
    check_f1_threshold,
    declines,
    fold,
    is_inside,
    normalise,
    parse_f1_threshold,
    rouge_l,
    token_f1,
)
from selfdoubt.eval.judges.verdict import NO_ANSWER, Judge, Verdict, parse_verdict
from selfdoubt.eval.records import Question

NO_COMMENT = "I have no comment."


@dataclass(frozen=True)
class Exact:
    """Equal to an accepted answer in normal form (SQuAD's exact match). The grade is 0 or 1."""

    def __call__(self, question: Question, answer: str | None, /) -> Verdict:
        """Judge an answer."""
        return _against_accepted(question, answer, lambda a, b: float(normalise(a) == normalise(b)), 1.0)


@dataclass(frozen=True)
class F1:
    """Token F1 with the nearest accepted answer (SQuAD) of at least ``threshold``. The grade is the F1, in [0, 1]."""

    threshold: float = 0.5  #: in (0, 1]

    def __post_init__(self) -> None:
        check_f1_threshold(self.threshold)

    def __call__(self, question: Question, answer: str | None, /) -> Verdict:
        """Judge an answer."""
        return _against_accepted(question, answer, token_f1, self.threshold)


@dataclass(frozen=True)
class Contains:
    """The answer contains an accepted answer as whole words, without regard to case, accents and punctuation.

    Signs that change the meaning count: -5 is not 5, C++ not C, ≥ 5 not ≤ 5, 10⁶ not 106; "minus 5" is -5, and a unit
    ($, %, °) may be missing but not another one. Scripts without spaces between words, and Korean particles, are known.
    It does not count where "not" or "never" stands right before it ("is not Paris", "isn't in Paris"); where the answer
    declines; and "yes" and "no" count as the first word alone. A known wrong answer outside the accepted one makes the
    answer wrong, as naming several is not knowing. Else whatever stands around it is not looked at: "Paris or Rome" is
    right where only Paris is known. The grade is 0 or 1.
    """

    def __call__(self, question: Question, answer: str | None, /) -> Verdict:
        """Judge an answer."""
        return _against_accepted(question, answer, functools.partial(_contained, question), 1.0)


@dataclass(frozen=True)
class Rouge:
    """Nearer to a true answer than to any false one in ROUGE-L (TruthfulQA; Lin et al., 2022).

    The grade is the similarity to the nearest true answer minus that to the nearest false one, in [-1, 1]; above 0 is
    right.
    As in the paper every reference ends in a full stop, and "I have no comment." is among the true ones.
    """

    def __call__(self, question: Question, answer: str | None, /) -> Verdict:
        """Judge an answer."""
        return _nearest(question, answer, lambda text, reference: rouge_l(reference, text))


@dataclass(frozen=True)
class Bleu:
    """As ``Rouge`` with BLEU of one sentence (sacrebleu: international tokens, exponential smoothing), in [-1, 1].

    An answer or reference of under four words has BLEU 0, so a short answer is judged wrong: prefer ``Rouge`` there.
    """

    def __call__(self, question: Question, answer: str | None, /) -> Verdict:
        """Judge an answer."""
        return _nearest(question, answer, _bleu)


@dataclass(frozen=True)
class Regex:
    """The pattern is found in the answer (``re.search``). ``{answer}`` in it stands for any accepted answer, literally.

    Example:
        >>> Regex("(?i)^{answer}$")(Question("1", "Capital of France?", answers=("Paris",)), "paris").correct
        True
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self._filled(("",)))
        except re.error as error:
            raise ConfigError(
                f"{self.pattern!r} is not a valid regular expression ({error}); fix it, e.g. escape with \\"
            ) from None

    def __call__(self, question: Question, answer: str | None, /) -> Verdict:
        """Judge an answer."""
        if answer is None:
            return NO_ANSWER
        if "{answer}" in self.pattern and not question.answers:
            return Verdict(declines(answer), float(declines(answer)))
        matches = bool(re.search(self._filled(question.answers), answer))
        return Verdict(matches, float(matches))

    def _filled(self, answers: Iterable[str]) -> str:
        return self.pattern.replace("{answer}", f"(?:{'|'.join(map(re.escape, answers))})")


@dataclass(frozen=True)
class Column:
    """A person's judgement of the answers in a file, from a column of it (``question_sets.read_column``).

    Yes, true, right, correct, 1 and their opposites in any case; a number between 0 and 1 is a grade, right from 0.5
    on; an empty cell is unjudged.
    """

    name: str
    values: Mapping[str, Any] = field(repr=False)  #: by the question's id

    def __call__(self, question: Question, answer: str | None, /) -> Verdict:
        """Judge an answer.

        Raises:
            DataError: If the cell is something else.
        """
        if answer is None:
            return NO_ANSWER
        verdict = parse_verdict(f"column {self.name} of question {question.id}", self.values.get(question.id))
        return Verdict(None, None, f"the column {self.name} is empty") if verdict.correct is None else verdict


def build_judge(spec: str, *, column: Mapping[str, Any] | None = None) -> Judge:
    """Build a judge by name: exact, f1, f1:0.5, contains, rouge, bleu, choice, regex:PATTERN, column:NAME.

    Args:
        spec: Name of the judge, with its setting after a colon.
        column: Cells by question id, for ``column:NAME``.

    Raises:
        ConfigError: If the name is unknown, or its setting is missing or wrong.
    """
    name, colon, setting = spec.partition(":")
    if name in _PLAIN and not colon:
        return _PLAIN[name]()
    if name == "f1" and colon:
        return F1(parse_f1_threshold(setting))
    if name == "regex" and setting:
        return Regex(setting)
    if name == "column" and setting:
        if column is None:
            raise ConfigError(f"the judge {spec!r} needs the cells of that column; give a file that has it")
        return Column(setting, column)
    raise ConfigError(f"no judge is called {spec!r}; choose one of {', '.join(JUDGES)}")


_PLAIN: dict[str, Callable[[], Judge]] = {
    "exact": Exact, "f1": F1, "contains": Contains, "rouge": Rouge, "bleu": Bleu, "choice": Choice,
}  # fmt: skip
#: Names as a person writes them. ``llm`` asks another model: ``selfdoubt.eval.judges.llm``.
JUDGES = ("exact", "f1:0.5", "contains", "rouge", "bleu", "choice", "regex:PATTERN", "column:NAME", "llm")


def get_judge_name(one: Judge) -> str:
    """Return a judge's name; for a judge of ``build_judge``, the spec that builds it."""
    if isinstance(one, Regex):
        return f"regex:{one.pattern}"
    if isinstance(one, Column):
        return f"column:{one.name}"
    if isinstance(one, F1):
        return f"f1:{one.threshold:g}"
    model = getattr(one, "model", None)
    return f"llm: {model}" if isinstance(model, str) else getattr(one, "__name__", type(one).__name__).lower()


def needs_answers(one: Judge) -> bool:
    """Return whether a judge compares with accepted answers: all except a column, and a pattern without {answer}."""
    return not isinstance(one, Column) and (not isinstance(one, Regex) or "{answer}" in one.pattern)


def choose_default_judge(questions: Iterable[Question]) -> str:
    """Choose the usual judge of a set, by whether most questions have choices, known wrong answers, or neither.

    Returns:
        "choice", "rouge" or "contains".
    """
    asked = list(questions)
    if 2 * sum(bool(q.choices) for q in asked) > len(asked):
        return "choice"
    if 2 * sum(bool(q.wrong_answers and q.answers) for q in asked) > len(asked):
        return "rouge"
    return "contains"


def _against_accepted(
    question: Question, answer: str | None, similarity: Callable[[str, str], float], threshold: float
) -> Verdict:
    if answer is None:
        return NO_ANSWER
    if question.answers:
        grade = max(similarity(answer, accepted) for accepted in question.answers)
        return Verdict(grade >= threshold, grade)
    if question.choices:
        return Verdict(None, None, "the question has choices but no accepted answers; judge it by choice")
    return Verdict(declines(answer), float(declines(answer)))


_NEGATED = re.compile(r"\b(not|never|\w+n t|cannot)( (in|at|on|by|from|to|of))?( (a|an|the))? $")


def _contained(question: Question, answer: str, accepted: str) -> float:
    text = fold(answer)
    words = _name(accepted)
    if not words:  # signs alone: "!"; or a tag, which stands as it is: "the <p> tag"
        bare, spoken = accepted.strip().lower(), answer.strip().lower()
        return float(bare in spoken if any(c.isalnum() for c in bare) else bare == spoken)
    if text == words or text == fold(accepted):
        return 1.0
    if declines(answer):
        return 0.0
    if words in ("yes", "no"):
        return float(text.split()[:1] == [words])
    stands = [at for at, _ in _stands(words, text) if not _NEGATED.search(text[:at])]
    if not stands:
        return 0.0
    right = {_name(a) for a in question.answers}
    known = [span for name in right for span in _stands(name, text)]
    others = [*question.wrong_answers, *(c for i, c in enumerate(question.choices) if i not in question.right)]
    for name in {_name(o) for o in others} - right:
        for span in _stands(name, text):
            if not any(is_inside(span, other) for other in known) and not _NEGATED.search(text[: span[0]]):
                return 0.0
    return 1.0


def _stands(name: str, text: str) -> list[tuple[int, int]]:
    """Find where a folded name stands, with its signs or with them said in words."""
    return [span for way in (name, *say_signs(name)) for span in find_spans(way, text)]


def _name(text: str) -> str:
    """Fold a name, and leave out an article before it."""
    return re.sub(r"^(a|an|the) (?=\S)", "", fold(text))


def _nearest(question: Question, answer: str | None, similarity: Callable[[str, str], float]) -> Verdict:
    if answer is None:
        return NO_ANSWER
    if not question.answers or not question.wrong_answers:
        return Verdict(None, None, "this judge needs right and wrong answers to compare with")
    true, false = (list(map(_closed, a)) for a in (question.answers, question.wrong_answers))
    true += [] if NO_COMMENT in true else [NO_COMMENT]
    grade = max(similarity(answer, t) for t in true) - max(similarity(answer, f) for f in false)
    return Verdict(grade > 0, grade)


def _closed(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _bleu(answer: str, reference: str) -> float:
    return float(_bleu_metric().corpus_score([answer], [[reference]]).score) / 100


@functools.cache
def _bleu_metric() -> Any:
    return require("sacrebleu", "qa").BLEU(tokenize="intl", smooth_method="exp", effective_order=False, force=True)
