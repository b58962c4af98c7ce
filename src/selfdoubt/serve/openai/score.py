"""``/v1/score``: the risk of texts that exist already, in pieces small enough that others' tokens hardly wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from selfdoubt.errors import BusyError, ConfigError, DeadlineError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.scoring import TeacherForcedText, encode_teacher_forced
from selfdoubt.serve.engine.client import Desk
from selfdoubt.serve.http.encoders import Encoders, total_size
from selfdoubt.serve.openai import risks
from selfdoubt.serve.openai.params import chat_of
from selfdoubt.serve.openai.requests import ScoreItem

#: Texts, and characters of them, that are scored side by side.
PIECE, CHARACTERS = 4, 2000
Pair = tuple[PromptLike | None, str]


class Scorer:
    """Scores for all who ask; at most ``limits.queue`` requests wait.

    Args:
        engine: Who scores.
        encoders: Who turns texts into token ids.
    """

    def __init__(self, engine: Desk, encoders: Encoders) -> None:
        self._engine, self._encoders = engine, encoders
        self._waiting = 0

    async def score(self, items: Sequence[ScoreItem], *, raw: bool, timeout: float) -> list[Answer]:
        """Score each item. Whoever is cancelled meanwhile, or has run out of time, ends the work.

        Raises:
            BusyError: If too many wait already.
            DeadlineError: If the time is over.
            EngineError: If the engine has failed or is closing.
            PromptError: If a text is empty or too long.
            ConfigError: If there are too many items, or one has a question and messages.
        """
        if len(items) > self._engine.limits.texts:
            most = self._engine.limits.texts
            raise ConfigError(f"a request may have {most} texts to score at most here, got {len(items)}; send several")
        pairs = [self._pair(item) for item in items]
        if self._waiting >= self._engine.limits.queue:
            raise BusyError(f"{self._waiting} requests to score are waiting already; try again in a moment")
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                found: list[Answer] = []
                for piece in pieces(pairs):
                    work = partial(encode_teacher_forced, self._engine.front.tokenizer, piece, raw=raw)
                    given: list[TeacherForcedText] = await self._encoders.run(work, total_size(piece))
                    scored: asyncio.Future[list[Answer]] = asyncio.wrap_future(self._engine.score(given))
                    found += await scored
        except TimeoutError:
            raise DeadlineError(f"the request took longer than {timeout:g} s; score fewer texts at a time") from None
        finally:
            self._waiting -= 1
        return found

    def _pair(self, item: ScoreItem) -> Pair:
        limits, context = self._engine.limits, self._engine.front.context
        if item.question is not None and item.messages is not None:
            raise ConfigError("a text to score answers a question or messages, not both; give one of them")
        question = item.question if item.messages is None else chat_of(item.messages, limits)
        for text in (question, item.text):
            if text is not None:
                limits.check(text, context)
        return question, item.text


def pieces(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs in their order, a few at a time."""
    piece: list[Pair] = []
    length = 0
    for pair in pairs:
        size = total_size([pair])
        if piece and (len(piece) == PIECE or length + size > CHARACTERS):
            yield piece
            piece, length = [], 0
        piece.append(pair)
        length += size
    if piece:
        yield piece


def of_given(front: LMFront, index: int, answer: Answer) -> dict[str, Any]:
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
        "tokens": [risks.of_token(front, token) for token in answer.tokens],
        "question": risks.of_question(front, answer.question),
        "question_tokens": [risks.of_token(front, token) for token in answer.question],
    }
