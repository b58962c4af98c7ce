"""The state of a conversation: turns, their answers, and the part that a user may see. It knows nothing of the page."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from selfdoubt.lm import defaults
from selfdoubt.lm.answer import UNSURE, Answer, Token
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.confidence import confidence_order, is_confident
from selfdoubt.serve.engine.request import RequestHandle

#: One answer; answers one after the other until one is sure enough; several answers side by side.
AnswerMode = Literal["once", "until", "candidates"]
#: Confidence that is sure enough, if neither the user nor a calibration sets another.
DEFAULT_CONFIDENCE = 0.5


@dataclass(frozen=True)
class ChatSettings:
    """Settings on the page, as the user has set them."""

    temperature: float = defaults.TEMPERATURE
    max_tokens: int = defaults.MAX_TOKENS
    seed: int = defaults.SEED
    at_least: float = 0.0  #: least confidence of an answer that is shown, in [0, 1]; 0 shows all
    candidates: int = 5
    max_tries: int = 8
    memory: bool = True  #: earlier turns are part of the question

    def to_json(self) -> dict[str, Any]:
        """Return the settings as the conversation's file names them."""
        return {"tries" if name == "max_tries" else name: value for name, value in asdict(self).items()}


@dataclass
class Attempt:
    """One answer in progress."""

    seed: int
    tokens: list[Token] = field(default_factory=list)
    answer: Answer | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(t.text for t in self.tokens) if self.answer is None else self.answer.text


@dataclass
class Turn:
    """A question and its answers."""

    id: int
    question: str
    mode: AnswerMode
    settings: ChatSettings
    before: tuple[dict[str, str], ...] = ()  #: the messages before it, if they are remembered
    needed_confidence: float = 0.0  #: confidence at which answering again ends
    question_tokens: list[Token] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    state: Literal["running", "done", "stopped"] = "running"
    revealed: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages that the model reads."""
        return [*self.before, {"role": "user", "content": self.question}]

    @property
    def temperature(self) -> float:
        """The temperature as set, but 1 for several answers at 0, which would all be the same."""
        return self.settings.temperature or (0.0 if self.mode == "once" else 1.0)

    @property
    def ranked(self) -> list[Attempt]:
        """The attempts, the least doubtful first; those that have not ended come last, in their order."""
        ended = [(attempt, attempt.answer) for attempt in self.attempts if attempt.answer is not None]
        ranked = sorted(ended, key=lambda pair: confidence_order(pair[1]))
        return [
            *(attempt for attempt, _ in ranked),
            *(attempt for attempt in self.attempts if attempt.answer is None),
        ]

    @property
    def best(self) -> Attempt | None:
        """The attempt that represents the turn: one that is sure enough, or the least doubtful, or one in progress.

        None before the first.
        """
        if not self.attempts:
            return None
        last = self.attempts[-1]
        if self.mode == "until" and last.answer is not None and self.is_sure_enough(last.answer):
            return last
        return self.ranked[0]

    @property
    def answered(self) -> int:
        """The number of attempts that have ended."""
        return sum(attempt.answer is not None for attempt in self.attempts)

    @property
    def is_confident(self) -> bool:
        """True if answering again has led to an answer that is sure enough."""
        return self.best is not None and self.best.answer is not None and self.is_sure_enough(self.best.answer)

    def is_sure_enough(self, answer: Answer) -> bool:
        """Return whether an answer ends the attempts."""
        return is_confident(get_confidence(answer), self.needed_confidence)

    def hides(self, attempt: Attempt) -> bool:
        """Return whether the text is hidden: it is not judged yet, or too doubtful, and was not revealed."""
        if self.revealed:
            return False
        if self.state == "running" and self.mode == "until":
            return True
        if self.settings.at_least <= 0:
            return False
        if self.state == "running" or attempt.answer is None:
            return True
        sure = get_confidence(attempt.answer)
        return sure is None or sure < self.settings.at_least

    @property
    def is_hidden(self) -> bool:
        """True if the turn has ended and nothing of it may be seen."""
        return self.state != "running" and all(self.hides(attempt) for attempt in self.attempts)

    @property
    def shown(self) -> str:
        """The answer as the user sees it, as plain text; empty before the first token."""
        if self.is_hidden:
            return UNSURE if self.attempts else ""
        seen = [attempt for attempt in self.ranked if not self.hides(attempt)]
        if self.mode == "candidates" and len(seen) > 1:
            return "\n".join(f"{i}. {attempt.text}" for i, attempt in enumerate(seen, 1))
        return seen[0].text if seen else ""

    @property
    def remembered(self) -> str:
        """The answer in the history of later turns: one answer, or ``UNSURE`` for a hidden one."""
        if self.is_hidden:
            return UNSURE
        return next((attempt.text for attempt in self.ranked if not self.hides(attempt)), "")


def get_confidence(answer: Answer) -> float | None:
    """Return the confidence that the page shows, in [0, 1]: ``p_correct``, or without a calibration the share of
    reference answers that are riskier. None without either, or if the calibration does not hold for the answer.
    """
    if answer.p_correct is not None or answer.p_correct_note is not None:
        return answer.p_correct
    return None if answer.percentile is None else 1 - answer.percentile


def recommend_confidence(calibration: Calibration | None) -> float | None:
    """Return the calibrated threshold in whole percent, rounded up so that its guarantee holds; None without one.

    Example:
        >>> recommend_confidence(Calibration("isotonic", ("sum_nll",), knots=((0, 1),), threshold=0.8364))
        0.84
    """
    if calibration is None or calibration.threshold is None:
        return None
    return math.ceil(round(calibration.threshold * 100, 6)) / 100


def build_history(turns: Iterable[Turn]) -> tuple[dict[str, str], ...]:
    """Return the messages of turns that have ended, with the answers that were shown."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        if turn.state != "running" and turn.remembered.strip():
            messages += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.remembered},
            ]
    return tuple(messages)


class Conversation:
    """All turns of one browser tab, and the request that runs for it."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.notice = ""  #: one line about the last error
        self.editing: int | None = None  #: the turn whose question is being rewritten
        self.handle: RequestHandle | None = None
        self.halted = asyncio.Event()
        self._next = 1
        self._replaced: list[Turn] = []

    @property
    def busy(self) -> bool:
        """True if a turn is running."""
        return any(turn.state == "running" for turn in self.turns)

    def find_turn(self, number: int) -> Turn | None:
        """Return the turn with this id."""
        return next((turn for turn in self.turns if turn.id == number), None)

    def start_turn(
        self,
        question: str,
        settings: ChatSettings,
        mode: AnswerMode = "once",
        threshold: float | None = None,
        instead: int | None = None,
    ) -> Turn:
        """Start a turn.

        Args:
            question: The text that the user typed.
            settings: The settings now.
            mode: One answer or several.
            threshold: The recommended confidence, which ends the attempts if the person has set none.
            instead: Id of the turn that it replaces, with all turns after it.
        """
        self.notice = ""
        self.halted = asyncio.Event()
        place = next((i for i, turn in enumerate(self.turns) if turn.id == instead), len(self.turns))
        self._replaced = self.turns[place:]
        del self.turns[place:]
        before = build_history(self.turns) if settings.memory else ()
        needed = settings.at_least or threshold or DEFAULT_CONFIDENCE
        turn = Turn(self._next, question, mode, settings, before, needed)
        self._next += 1
        self.turns.append(turn)
        return turn

    def retry_turn(self, old: Turn, settings: ChatSettings, mode: AnswerMode, threshold: float | None = None) -> Turn:
        """Ask an earlier question again, in its place.

        A single answer is drawn with the next seed, and a temperature of 0 counts as 1, so that another answer comes.
        """
        if mode == "once":
            seed = max(attempt.seed for attempt in old.attempts or [Attempt(0)]) + 1
            settings = replace(settings, temperature=settings.temperature or 1.0, seed=seed)
        return self.start_turn(old.question, settings, mode, threshold, instead=old.id)

    def drop_turn(self, turn: Turn) -> list[Turn]:
        """Forget the last turn, which failed; the turns that stood in its place come back and are returned."""
        back, self._replaced = self._replaced, []
        self.turns = [other for other in self.turns if other is not turn] + back
        return back

    def stop(self) -> None:
        """End the request that runs, now."""
        self.halted.set()
        if self.handle is not None:
            self.handle.cancel()

    def clear(self) -> None:
        """Forget everything."""
        self.stop()
        self.turns = []
        self.notice, self.editing = "", None

    def to_json(self, head: dict[str, Any]) -> dict[str, Any]:
        """Return plain data for a file.

        Args:
            head: Facts about the model and the program.
        """
        return {**head, "turns": [_turn_to_json(turn) for turn in self.turns]}


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return {
        "question": turn.question,
        "question_tokens": _tokens_to_json(turn.question_tokens),
        "way": turn.mode,
        "settings": turn.settings.to_json(),
        "temperature": turn.temperature,
        "remembered": list(turn.before),
        "state": turn.state,
        "shown": turn.shown,
        "withheld": turn.is_hidden,
        "answers": [
            {
                **({"text": attempt.text} if attempt.answer is None else attempt.answer.to_dict()),
                "seed": attempt.seed,
                "sure": None if attempt.answer is None else get_confidence(attempt.answer),
                "abstain": None if attempt.answer is None else attempt.answer.abstain,
                "hidden": turn.hides(attempt),
                "tokens": _tokens_to_json(attempt.tokens if attempt.answer is None else attempt.answer.tokens),
            }
            for attempt in turn.ranked
        ],
    }


def _tokens_to_json(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [asdict(token) for token in tokens]
