"""A conversation: what was asked, what was answered, and what of it a person gets to see. Knows no page."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

from selfdoubt.lm import defaults
from selfdoubt.lm.answer import UNSURE, Answer, Token
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.confidence import confidence_order, is_confident
from selfdoubt.serve.engine.request import Job

#: One answer; answers one after the other until one is sure enough; several answers side by side.
Way = Literal["once", "until", "candidates"]
#: Where neither the person nor a calibration says how sure is sure enough.
SURE_ENOUGH = 0.5


@dataclass(frozen=True)
class Settings:
    """What a person has set on the page."""

    temperature: float = defaults.TEMPERATURE
    max_tokens: int = defaults.MAX_TOKENS
    seed: int = defaults.SEED
    at_least: float = 0.0  #: least sureness of an answer that is shown, in [0, 1]; 0 shows all
    candidates: int = 5
    tries: int = 8
    memory: bool = True  #: earlier turns are part of the question


@dataclass
class Take:
    """One answer in the making."""

    seed: int
    tokens: list[Token] = field(default_factory=list)
    answer: Answer | None = None

    @property
    def text(self) -> str:
        """What there is of it."""
        return "".join(t.text for t in self.tokens) if self.answer is None else self.answer.text


@dataclass
class Turn:
    """A question and its answers."""

    id: int
    question: str
    way: Way
    settings: Settings
    before: tuple[dict[str, str], ...] = ()  #: the messages that went before, where they are remembered
    need: float = 0.0  #: sureness at which answering again ends
    asked: list[Token] = field(default_factory=list)
    takes: list[Take] = field(default_factory=list)
    state: Literal["running", "done", "stopped"] = "running"
    revealed: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the model reads."""
        return [*self.before, {"role": "user", "content": self.question}]

    @property
    def temperature(self) -> float:
        """As set, but several answers at 0 would all be the same."""
        return self.settings.temperature or (0.0 if self.way == "once" else 1.0)

    @property
    def ranked(self) -> list[Take]:
        """The takes, the least doubtful first; those that have not ended come last, in their order."""
        ended = [take for take in self.takes if take.answer is not None]
        return [
            *sorted(ended, key=lambda take: confidence_order(cast("Answer", take.answer))),
            *(take for take in self.takes if take.answer is None),
        ]

    @property
    def best(self) -> Take | None:
        """The take that stands for the turn: one that is sure enough, or the least doubtful, or the one in the making.

        None before the first.
        """
        if not self.takes:
            return None
        if self.way == "until" and self.takes[-1].answer is not None and self.sure_enough(self.takes[-1].answer):
            return self.takes[-1]
        return self.ranked[0]

    @property
    def answered(self) -> int:
        """How many takes have ended."""
        return sum(take.answer is not None for take in self.takes)

    @property
    def confident(self) -> bool:
        """Whether answering again has led to an answer that is sure enough."""
        return self.best is not None and self.best.answer is not None and self.sure_enough(self.best.answer)

    def sure_enough(self, answer: Answer) -> bool:
        """Whether an answer ends the tries."""
        return is_confident(sureness(answer), self.need)

    def hides(self, take: Take) -> bool:
        """Whether the text must not be seen: there is no verdict yet, or it was too doubtful; unless asked for."""
        if self.revealed:
            return False
        if self.state == "running" and self.way == "until":
            return True
        if self.settings.at_least <= 0:
            return False
        if self.state == "running" or take.answer is None:
            return True
        sure = sureness(take.answer)
        return sure is None or sure < self.settings.at_least

    @property
    def withheld(self) -> bool:
        """Whether the turn has ended and nothing of it may be seen."""
        return self.state != "running" and all(self.hides(t) for t in self.takes)

    @property
    def shown(self) -> str:
        """What a person sees as the answer, as plain text; empty where there is nothing yet."""
        if self.withheld:
            return UNSURE if self.takes else ""
        seen = [t for t in self.ranked if not self.hides(t)]
        if self.way == "candidates" and len(seen) > 1:
            return "\n".join(f"{i}. {t.text}" for i, t in enumerate(seen, 1))
        return seen[0].text if seen else ""

    @property
    def said(self) -> str:
        """What the model is told that it has said: one answer, or that it was not sure."""
        if self.withheld:
            return UNSURE
        return next((t.text for t in self.ranked if not self.hides(t)), "")


def sureness(answer: Answer) -> float | None:
    """Return how sure an answer is, in [0, 1]: ``p_correct``, or without a calibration the share of reference answers
    that are riskier. None where there is neither, or where the calibration does not hold.
    """
    if answer.p_correct is not None or answer.p_correct_note is not None:
        return answer.p_correct
    return None if answer.percentile is None else 1 - answer.percentile


def recommended(calibration: Calibration | None) -> float | None:
    """The calibrated threshold in whole percent, rounded up so that its promise holds; None without one.

    Example:
        >>> recommended(Calibration("isotonic", ("sum_nll",), knots=((0, 1),), threshold=0.8364))
        0.84
    """
    if calibration is None or calibration.threshold is None:
        return None
    return math.ceil(round(calibration.threshold * 100, 6)) / 100


def history(turns: Iterable[Turn]) -> tuple[dict[str, str], ...]:
    """Messages of turns that have ended, with what was shown of them."""
    found: list[dict[str, str]] = []
    for turn in turns:
        if turn.state != "running" and turn.said.strip():
            found += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.said}]
    return tuple(found)


class Conversation:
    """All turns of one browser tab, and the request that runs for it."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.notice = ""  #: one line about what went wrong last
        self.editing: int | None = None  #: the turn whose question is being written anew
        self.job: Job | None = None
        self.halted = asyncio.Event()
        self._next = 1
        self._replaced: list[Turn] = []

    @property
    def busy(self) -> bool:
        """Whether a turn is running."""
        return any(turn.state == "running" for turn in self.turns)

    def turn(self, number: int) -> Turn | None:
        """The turn with this id."""
        return next((t for t in self.turns if t.id == number), None)

    def begin(
        self,
        question: str,
        settings: Settings,
        way: Way = "once",
        threshold: float | None = None,
        instead: int | None = None,
    ) -> Turn:
        """Begin a turn.

        Args:
            question: What a person typed.
            settings: As they are now.
            way: How many answers.
            threshold: The recommended sureness, which ends the tries where the person has set none.
            instead: The turn in whose place it comes; that one and what came after it are gone.
        """
        self.notice = ""
        self.halted = asyncio.Event()
        place = next((i for i, t in enumerate(self.turns) if t.id == instead), len(self.turns))
        self._replaced = self.turns[place:]
        del self.turns[place:]
        before = history(self.turns) if settings.memory else ()
        turn = Turn(self._next, question, way, settings, before, settings.at_least or threshold or SURE_ENOUGH)
        self._next += 1
        self.turns.append(turn)
        return turn

    def again(self, old: Turn, settings: Settings, way: Way, threshold: float | None = None) -> Turn:
        """Ask an earlier question anew, in its place. One answer is drawn with the next seed: the same one again is no
        use, so a temperature of 0 counts as 1.
        """
        if way == "once":
            settings = replace(
                settings, temperature=settings.temperature or 1.0, seed=max(t.seed for t in old.takes or [Take(0)]) + 1
            )
        return self.begin(old.question, settings, way, threshold, instead=old.id)

    def drop(self, turn: Turn) -> list[Turn]:
        """Forget the last turn, which came to nothing; what stood in its place comes back and is returned."""
        back, self._replaced = self._replaced, []
        self.turns = [t for t in self.turns if t is not turn] + back
        return back

    def stop(self) -> None:
        """End what runs, now."""
        self.halted.set()
        if self.job is not None:
            self.job.cancel()

    def clear(self) -> None:
        """Forget everything."""
        self.stop()
        self.turns = []
        self.notice, self.editing = "", None

    def to_json(self, about: dict[str, Any]) -> dict[str, Any]:
        """Plain data for a file.

        Args:
            about: What is said of the model and the program.
        """
        return {**about, "turns": [_plain(turn) for turn in self.turns]}


def _plain(turn: Turn) -> dict[str, Any]:
    return {
        "question": turn.question,
        "question_tokens": _tokens(turn.asked),
        "way": turn.way,
        "settings": asdict(turn.settings),
        "temperature": turn.temperature,
        "remembered": list(turn.before),
        "state": turn.state,
        "shown": turn.shown,
        "withheld": turn.withheld,
        "answers": [
            {
                **({"text": take.text} if take.answer is None else take.answer.to_dict()),
                "seed": take.seed,
                "sure": None if take.answer is None else sureness(take.answer),
                "abstain": None if take.answer is None else take.answer.abstain,
                "hidden": turn.hides(take),
                "tokens": _tokens(take.tokens if take.answer is None else take.answer.tokens),
            }
            for take in turn.ranked
        ],
    }


def _tokens(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [asdict(token) for token in tokens]
