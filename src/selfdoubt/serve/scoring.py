"""``/v1/score``: the risk of texts that exist already, in pieces small enough that others' tokens hardly wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from selfdoubt.errors import BusyError, ConfigError, DeadlineError, PromptError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.prompt import count_tokens
from selfdoubt.lm.questions import Question
from selfdoubt.serve import risks
from selfdoubt.serve.desk import Desk
from selfdoubt.serve.plan import chat_of
from selfdoubt.serve.wire import ScoreItem

#: Texts, and characters of them, that are scored between two tokens of other answers.
PIECE, CHARACTERS = 4, 2000
Pair = tuple[Question | None, str]


class Scorer:
    """Scores for all who ask, one piece after the other; at most ``limits.queue`` requests wait."""

    def __init__(self, engine: Desk) -> None:
        self._engine = engine
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def score(self, items: Sequence[ScoreItem], *, raw: bool, timeout: float) -> list[dict[str, Any]]:
        """One ``shapes.Score`` an item.

        Raises:
            BusyError: If too many wait already.
            DeadlineError: If the time is over.
            EngineError: If the engine has failed or is closing.
            PromptError: If a text is empty or too long.
            ConfigError: If an item has a question and messages.
        """
        pairs = [_pair(item) for item in items]
        if self._waiting >= self._engine.limits.queue:
            raise BusyError(f"{self._waiting} requests to score are waiting already; try again in a moment")
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                found: list[Answer] = []
                for piece in pieces(pairs):
                    found += await self._piece(piece, raw)
        except TimeoutError:
            raise DeadlineError(f"the request took longer than {timeout:g} s; score fewer texts at a time") from None
        finally:
            self._waiting -= 1
        lm = self._engine.lm
        return [of_given(lm, i, answer) for i, answer in enumerate(found)]

    async def _piece(self, piece: Sequence[Pair], raw: bool) -> list[Answer]:
        most = self._engine.limits.prompt_tokens

        def work(lm: RiskAwareLM) -> list[Answer]:
            for _, text in piece:
                if most is not None and count_tokens(lm.tokenizer, text) > most:
                    raise PromptError(f"a text to score has more than {most} tokens")
            return lm.score_batch(piece, raw=raw, alternatives=0)

        async with self._turn:  # in turns: nobody's long list holds up the others' short ones
            return await asyncio.wrap_future(self._engine.call(work))


def pieces(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs in their order, a few at a time."""
    piece: list[Pair] = []
    length = 0
    for pair in pairs:
        size = len(pair[1]) + sum(map(len, _texts(pair[0])))
        if piece and (len(piece) == PIECE or length + size > CHARACTERS):
            yield piece
            piece, length = [], 0
        piece.append(pair)
        length += size
    if piece:
        yield piece


def of_given(lm: RiskAwareLM, index: int, answer: Answer) -> dict[str, Any]:
    """A scored text."""
    return {
        "object": "score",
        "index": index,
        "risk": answer.risk,
        "risk_name": answer.risk_name,
        "percentile": answer.percentile,
        "p_correct": answer.p_correct,
        "p_correct_note": answer.p_correct_note,
        "abstain": answer.abstain,
        "scores": dict(answer.scores),
        "tokens": [risks.of_token(lm, token) for token in answer.tokens],
        "question": risks.of_question(lm, answer.question),
        "question_tokens": [risks.of_token(lm, token) for token in answer.question],
    }


def _texts(question: Question | None) -> list[str]:
    if question is None:
        return []
    return [question] if isinstance(question, str) else [message["content"] for message in question]


def _pair(item: ScoreItem) -> Pair:
    if item.question is not None and item.messages is not None:
        raise ConfigError("a text to score answers a question or messages, not both; give one of them")
    if item.messages is not None:
        return chat_of(item.messages), item.text
    return item.question, item.text
