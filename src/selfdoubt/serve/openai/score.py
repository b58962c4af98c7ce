"""Scores texts for ``/v1/score``, in pieces so small that other requests' tokens hardly wait."""

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
from selfdoubt.serve.engine.client import EngineClient
from selfdoubt.serve.http.encoders import EncoderThreads, measure_pairs
from selfdoubt.serve.openai import risks
from selfdoubt.serve.openai.params import convert_messages
from selfdoubt.serve.openai.requests import ScoreItem

#: Texts, and characters of them, that are scored side by side.
PAIRS_AT_ONCE, CHARACTERS_AT_ONCE = 4, 2000
ScoredPair = tuple[PromptLike | None, str]


class Scorer:
    """Scorer for all clients; at most ``limits.queue`` requests wait.

    Args:
        engine: The engine that scores.
        encoders: Threads that turn texts into token ids.
    """

    def __init__(self, engine: EngineClient, encoders: EncoderThreads) -> None:
        self._engine, self._encoders = engine, encoders
        self._waiting = 0

    async def score(self, items: Sequence[ScoreItem], *, raw: bool, timeout: float) -> list[Answer]:
        """Score each item. Cancelling this, or running out of time, ends the work.

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
            answers: list[Answer] = []
            async with asyncio.timeout(timeout):
                with self._engine.hold_open():  # a request that has begun is finished, also while the engine closes
                    for group in split_pairs(pairs):
                        work = partial(encode_teacher_forced, self._engine.front.tokenizer, group, raw=raw)
                        texts: list[TeacherForcedText] = await self._encoders.run(work, measure_pairs(group))
                        scored: asyncio.Future[list[Answer]] = asyncio.wrap_future(self._engine.score(texts))
                        answers += await scored
        except TimeoutError:
            raise DeadlineError(f"the request took longer than {timeout:g} s; score fewer texts at a time") from None
        finally:
            self._waiting -= 1
        return answers

    def _pair(self, item: ScoreItem) -> ScoredPair:
        limits, context = self._engine.limits, self._engine.front.context
        if item.question is not None and item.messages is not None:
            raise ConfigError("a text to score answers a question or messages, not both; give one of them")
        question = item.question if item.messages is None else convert_messages(item.messages, limits)
        for text in (question, item.text):
            if text is not None:
                limits.check_prompt_size(text, context)
        return question, item.text


def split_pairs(pairs: Sequence[ScoredPair]) -> Iterator[list[ScoredPair]]:
    """Yield pairs in their order, a few at a time."""
    group: list[ScoredPair] = []
    length = 0
    for pair in pairs:
        size = measure_pairs([pair])
        if group and (len(group) == PAIRS_AT_ONCE or length + size > CHARACTERS_AT_ONCE):
            yield group
            group, length = [], 0
        group.append(pair)
        length += size
    if group:
        yield group


def format_score(front: LMFront, index: int, answer: Answer) -> dict[str, Any]:
    """Return a scored text as plain data."""
    return {
        "object": "score",
        "index": index,
        "risk": answer.risk,
        "risk_name": answer.risk_name,
        "percentile": answer.percentile,
        "p_correct": answer.p_correct,
        "p_correct_note": answer.p_correct_note,
        "abstain": answer.abstain,
        "p_answerable": answer.p_answerable,
        "scores": dict(answer.scores),
        "tokens": [risks.format_token_risk(front, token) for token in answer.tokens],
        "question": risks.format_question_risk(front, answer.question),
        "question_tokens": [risks.format_token_risk(front, token) for token in answer.question],
    }
