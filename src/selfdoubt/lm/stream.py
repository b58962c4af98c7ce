"""An answer while it grows: tokens come in one by one, and at the end there is an ``Answer``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.decode import Event, Sampling, decode, read
from selfdoubt.lm.prompt import Detokenizer, Prompt
from selfdoubt.lm.stepper import HFStepper

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


class AnswerInProgress:
    """One answer in the making."""

    def __init__(self, lm: RiskAwareLM, question: list[Token]) -> None:
        self.lm = lm
        self.question = question
        self.tokens: list[Token] = []
        self.finish: Literal["stop", "length"] | None = None
        self._pieces = Detokenizer(lm.tokenizer)

    def add(self, event: Event) -> Token | None:
        """Take the next step; returns its token, if it has one."""
        token = None
        if event.token is not None:
            token = self.lm._token(event.token, self._pieces.add(event.token.id))
            self.tokens.append(token)
        self.finish = event.finish
        return token

    @property
    def answer(self) -> Answer:
        """The answer, once it has ended."""
        assert self.finish is not None
        text = "".join(t.text for t in self.tokens) + self._pieces.flush()
        return self.lm.answer(self.tokens, self.question, self.finish, text)


class Stream(Iterator[Token]):
    """Tokens as they are chosen. ``question`` is there from the start, ``answer`` when the tokens have ended."""

    def __init__(self, lm: RiskAwareLM, prompt: Prompt, sampling: Sampling, seed: int) -> None:
        stepper = HFStepper(lm.model)
        scored, following = read(stepper, [prompt.ids])
        self._sequence = AnswerInProgress(lm, lm._own(scored[0], prompt))
        self._events = decode(stepper, following, [len(prompt.ids)], sampling, [seed])

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
        if self._sequence.finish is None:
            raise ConfigError("the answer is not finished; read the stream to its end first")
        return self._sequence.answer

    def __next__(self) -> Token:
        for event in self._events:
            token = self._sequence.add(event)
            if token is not None:
                return token
        raise StopIteration
