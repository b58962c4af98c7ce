"""An answer while it grows: tokens come in one by one, and at the end there is an ``Answer``."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.calibration import States
from selfdoubt.lm.conditions import Made, Origin
from selfdoubt.lm.decode import Batch, Event, Line, run
from selfdoubt.lm.prompt import Detokenizer, Prompt
from selfdoubt.lm.reading import reading, whole
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.states import StatePool
from selfdoubt.lm.stepper import HFStepper

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


#: The model's most probable answer to a single question.
OWN = Origin("greedy")


class AnswerInProgress:
    """One answer in the making.

    Args:
        lm: Whose answer it is.
        question: The tokens of the question's own words.
        stops: Texts that end the answer.
        state: The hidden states at the question's end, where they are wanted.
        origin: How the answer is made, as far as it is known before it ends.
    """

    def __init__(
        self,
        lm: RiskAwareLM,
        question: list[Token],
        stops: Sequence[str] = (),
        state: Float[Tensor, "layers width"] | None = None,
        origin: Origin = OWN,
    ) -> None:
        self.lm = lm
        self._origin = origin
        self.question = question
        self.tokens: list[Token] = []
        self.finish: Literal["stop", "length"] | None = None
        self._stops = stops
        self._pieces = Detokenizer(lm.tokenizer)
        self._held: list[tuple[Token, Tensor | None]] = []  # their text may be the beginning of a stop
        self._cut = False
        self._asked = state
        self._first: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, event: Event) -> list[Token]:
        """Take the next step; returns the tokens that are certain now. After a stop text ``finish`` is set."""
        if self._first is None:
            self._first = event.states
        if event.token is not None:
            self._held.append((self.lm._token(event.token, self._pieces.add(event.token.id)), event.states))
        self.finish = event.finish
        if event.end is not None:
            by_caller = None if event.end.id in self.lm.stop_ids else f"token {event.end.id}"
            self._origin = replace(self._origin, end_gap=event.end.gap, stop=by_caller)
        text = "".join(token.text for token, _ in self._held)
        cut, stop = min(((at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=(None, None))
        if cut is not None:
            self.finish, self._cut = "stop", True
            self._origin = replace(self._origin, end_gap=0.0, stop=stop)
            return self._release(cut)
        # Hold back an end that may become a stop with the next token.
        ends = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
        return self._release(len(text) - (max(ends, default=0) if self.finish is None else 0))

    def _release(self, length: int) -> list[Token]:
        """Let go of the tokens within the first ``length`` characters; at a stop, cut the one that reaches beyond."""
        found: list[Token] = []
        start = 0
        while self._held:
            token, states = self._held[0]
            end = start + len(token.text)
            if end > length or (self._cut and start == length):
                if not self._cut or start == length:
                    break
                token = replace(token, text=token.text[: length - start])
            self._held.pop(0)
            found.append(token)
            if states is not None:
                self._sum = states if self._sum is None else self._sum + states
            start = end
            if start > length:
                break
        self.tokens += found
        return found

    @property
    def answer(self) -> Answer:
        """The answer, once it has ended."""
        assert self.finish is not None
        text = "".join(t.text for t in self.tokens) + ("" if self._cut else self._pieces.flush())
        return self.lm.answer(self.tokens, self.question, self.finish, text, self._states(), origin=self._origin)

    def _states(self) -> States | None:
        if self._asked is None or self._first is None:
            return None
        mean = self._first if self._sum is None else self._sum / max(1, len(self.tokens))
        return States(self.lm.layers, self._asked.cpu(), self._first.cpu(), mean.cpu())


class Wanted(NamedTuple):
    """One answer that is wanted."""

    name: int  #: what the batch calls it
    prompt: Prompt
    sampling: Sampling
    seed: int
    stops: Sequence[str] = ()

    @property
    def origin(self) -> Origin:
        """How the answer will come about."""
        own = self.sampling
        made: Made = "sampled" if own.temperature > 0 else "greedy"
        return Origin(made, self.prompt.form, own.temperature, own.top_p)


def opening(lm: RiskAwareLM, wanted: Sequence[Wanted]) -> Generator[None, None, tuple[list[AnswerInProgress], Batch]]:
    """Read prompts piece by piece; in the end there are answers in the making, and the batch that makes them.

    A prompt that comes several times is read once.
    """
    different = {tuple(want.prompt.ids): want.prompt for want in wanted}
    place = {ids: row for row, ids in enumerate(different)}
    rows = [place[tuple(want.prompt.ids)] for want in wanted]
    stepper = HFStepper(lm.model, lm.layers)
    pool = StatePool([[own_end(p)] for p in different.values()], [len(i) for i in different]) if lm.layers else None
    scored, following = yield from reading(stepper, [list(ids) for ids in different], pool=pool)
    questions = [lm._own(s, p) for s, p in zip(scored, different.values(), strict=True)]
    asked = [None] * len(different) if pool is None or pool.means is None else [means[0] for means in pool.means]
    answers = [
        AnswerInProgress(lm, questions[row], want.stops, asked[row], want.origin)
        for row, want in zip(rows, wanted, strict=True)
    ]
    if len(different) < len(wanted):
        stepper.keep(rows)
        following = following.of(rows)
    lines = [Line(w.name, w.sampling, w.seed, (stepper.context or 2**62) - len(w.prompt.ids)) for w in wanted]
    return answers, Batch(stepper, following, lines)


def answering(
    lm: RiskAwareLM, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], stops: Sequence[str]
) -> tuple[list[AnswerInProgress], Iterator[list[Token]]]:
    """Read prompts; answers in the making, and the steps that make them, each with the tokens that it made certain."""
    wanted = [Wanted(i, *each, stops) for i, each in enumerate(zip(prompts, repeat(sampling), seeds, strict=False))]
    answers, batch = whole(opening(lm, wanted))

    def steps() -> Iterator[list[Token]]:
        closed: set[int] = set()
        for event in run(batch, closed):
            yield answers[event.sequence].add(event)
            if answers[event.sequence].finish is not None:
                closed.add(event.sequence)

    return answers, steps()


def own_end(prompt: Prompt) -> tuple[int, int]:
    """The place of the question's last own token, or of the prompt's last."""
    last = max((i for i, own in enumerate(prompt.own) if own), default=len(prompt.ids) - 1)
    return last, last + 1


class Stream(Iterator[Token]):
    """Tokens as they are chosen. ``question`` is there from the start, ``answer`` when the tokens have ended."""

    def __init__(
        self, lm: RiskAwareLM, prompt: Prompt, sampling: Sampling, seed: int, stops: Sequence[str] = ()
    ) -> None:
        (self._sequence,), self._steps = answering(lm, [prompt], sampling, [seed], stops)
        self._ready: deque[Token] = deque()

    @property
    def question(self) -> list[Token]:
        """The tokens of the question's own words."""
        return self._sequence.question

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            ConfigError: If the tokens have not ended yet.
        """
        if self._sequence.finish is None or self._ready:
            raise ConfigError("the answer is not finished; read the stream to its end first")
        return self._sequence.answer

    def __next__(self) -> Token:
        while not self._ready:
            self._ready.extend(next(self._steps))
        return self._ready.popleft()
