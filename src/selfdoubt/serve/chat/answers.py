"""Asks the engine for what a turn wants, and says when there is something new to see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from selfdoubt.serve.chat.conversation import Conversation, Attempt, Turn
from selfdoubt.serve.engine.client import EngineClient
from selfdoubt.serve.engine.request import Started, TokensAdded, RequestHandle, Update
from selfdoubt.serve.http.encoders import EncoderThreads, measure_prompt

#: Seconds between two looks at an answer that grows: quicker than an eye follows, slow enough for a page to keep up.
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
    """Fill the turn, the last of the conversation; yields whenever it has changed, and ends when it has ended.

    ``encoders`` turn its question into token ids; None makes some for this turn.

    Raises:
        SelfdoubtError: What the engine says against it.
    """
    width = turn.settings.candidates if turn.way == "candidates" else 1
    rounds = turn.settings.tries if turn.way == "until" else 1
    encoders, own = encoders or EncoderThreads(1), encoders is None
    halted = conversation.halted  # this turn's own: the next one gets another
    try:
        for i in range(rounds):
            first = turn.settings.seed + i
            ask = partial(
                engine.ask,
                turn.messages,
                n=width,
                client=client,
                temperature=turn.temperature,
                max_tokens=turn.settings.max_tokens,
                seed=first,
            )
            job = await encoders.run(ask, measure_prompt(turn.messages), undo=RequestHandle.cancel)
            conversation.job = job
            place = len(turn.takes)
            turn.takes += [Attempt(first + j) for j in range(width)]
            async with aclosing(follow_updates(job, halted, period)) as news:
                async for updates in news:
                    for update in updates:
                        _take(turn, place, update)
                    yield
            if halted.is_set() or turn.confident:
                break
        turn.state = "stopped" if halted.is_set() else "done"
    finally:
        if own:
            encoders.close()
        if conversation.halted is halted:
            conversation.job = None
        if turn.state == "running":
            turn.state = "stopped"
    yield


async def follow_updates(job: RequestHandle, halted: asyncio.Event, period: float) -> AsyncGenerator[list[Update]]:
    """What the job tells, gathered over ``period`` seconds; the job is cancelled as soon as nobody listens or
    ``halted`` is set.
    """
    bursts = job.bursts()

    async def following() -> list[Update] | None:
        return await anext(bursts, None)

    coming, halt = asyncio.create_task(following()), asyncio.create_task(halted.wait())
    try:
        while True:
            await asyncio.wait({coming, halt}, return_when=asyncio.FIRST_COMPLETED)
            if halted.is_set() or (burst := coming.result()) is None:  # the result raises what has ended the request
                return
            yield burst
            await asyncio.wait({halt}, timeout=0 if job.ended else period)
            coming = asyncio.create_task(following())
    finally:
        if not coming.cancel() and not coming.cancelled():
            coming.exception()  # it was heard, or nobody wants to hear it any more
        halt.cancel()
        job.cancel()


def _take(turn: Turn, place: int, update: Update) -> None:
    if isinstance(update, Started):
        turn.asked = turn.asked or update.question
        return
    take = turn.takes[place + update.choice]
    if isinstance(update, TokensAdded):
        take.tokens += update.tokens
    else:
        take.answer = update.answer
