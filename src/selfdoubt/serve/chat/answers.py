"""Runs a turn: submits its requests to the engine, and yields at every change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from selfdoubt.serve.chat.conversation import Attempt, Conversation, Turn
from selfdoubt.serve.engine.client import EngineClient
from selfdoubt.serve.engine.request import RequestHandle, Started, TokensAdded, Update, cancel_on_exit
from selfdoubt.serve.http.encoders import EncoderThreads, measure_prompt

#: Seconds between two updates of an answer that grows: quicker than an eye follows, slow enough for a page to keep up.
PERIOD = 0.04


async def run_turn(
    engine: EngineClient,
    conversation: Conversation,
    turn: Turn,
    *,
    client: str = "",
    period: float = PERIOD,
    encoders: EncoderThreads | None = None,
) -> AsyncGenerator[None]:
    """Answer the last turn of a conversation; yield whenever it has changed, and end when it has ended.

    ``encoders`` encode its question; None makes some for this turn.

    Raises:
        SelfdoubtError: The error of the engine, if it refuses or ends the request.
    """
    width = turn.settings.candidates if turn.mode == "candidates" else 1
    rounds = turn.settings.max_tries if turn.mode == "until" else 1
    encoders, owns_encoders = encoders or EncoderThreads(1), encoders is None
    halted = conversation.halted  # this turn's own: the next one gets another
    try:
        for i in range(rounds):
            first = turn.settings.seed + i
            ask = partial(
                engine.generate,
                turn.messages,
                n=width,
                client=client,
                temperature=turn.temperature,
                max_tokens=turn.settings.max_tokens,
                seed=first,
            )
            handle = await encoders.run(ask, measure_prompt(turn.messages), undo=RequestHandle.cancel)
            conversation.handle = handle
            place = len(turn.attempts)
            turn.attempts += [Attempt(first + j) for j in range(width)]
            async with aclosing(follow_updates(handle, halted, period)) as news:
                async for updates in news:
                    for update in updates:
                        _apply(turn, place, update)
                    yield
            if halted.is_set() or turn.is_confident:
                break
        turn.state = "stopped" if halted.is_set() else "done"
    finally:
        if owns_encoders:
            encoders.close()
        if conversation.halted is halted:
            conversation.handle = None
        if turn.state == "running":
            turn.state = "stopped"
    yield


async def follow_updates(handle: RequestHandle, halted: asyncio.Event, period: float) -> AsyncGenerator[list[Update]]:
    """Yield the updates of a request, gathered over ``period`` seconds.

    The request is cancelled as soon as the caller stops reading or ``halted`` is set.
    """
    bursts = handle.bursts()

    async def read_next() -> list[Update] | None:
        return await anext(bursts, None)

    coming, halt = asyncio.create_task(read_next()), asyncio.create_task(halted.wait())
    with cancel_on_exit([handle]):
        try:
            while True:
                await asyncio.wait({coming, halt}, return_when=asyncio.FIRST_COMPLETED)
                if halted.is_set() or (burst := coming.result()) is None:  # the result raises what ended the request
                    return
                yield burst
                await asyncio.wait({halt}, timeout=0 if handle.ended else period)
                coming = asyncio.create_task(read_next())
        finally:
            if not coming.cancel() and not coming.cancelled():
                coming.exception()  # raised already, or not needed any more
            halt.cancel()


def _apply(turn: Turn, place: int, update: Update) -> None:
    if isinstance(update, Started):
        turn.question_tokens = turn.question_tokens or update.question
        return
    attempt = turn.attempts[place + update.choice]
    if isinstance(update, TokensAdded):
        attempt.tokens += update.tokens
    else:
        attempt.answer = update.answer
