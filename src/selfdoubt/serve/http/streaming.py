"""From a request's jobs to what is sent: whole or as server-sent events; a client that hangs up ends its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeVar

from starlette.responses import Response

from selfdoubt.lm.answer import Answer, Token
from selfdoubt.serve.engine.request import Began, Ended, Grew, Job, Update
from selfdoubt.serve.openai.errors import GoneError, fault_of
from selfdoubt.serve.openai.format import Teller, event

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The outcome of some work, which is cancelled when the client hangs up.

    Raises:
        GoneError: If the client hung up first.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def updates(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Update]]:
    """What happens to several jobs, as it happens. Whoever stops reading cancels them; so does an error in one."""
    try:
        if len(jobs) == 1:
            async for update in jobs[0].stream():
                yield 0, update
            return
        news: asyncio.Queue[tuple[int, Update | BaseException | None]] = asyncio.Queue()
        readers = [asyncio.ensure_future(_read(i, job, news)) for i, job in enumerate(jobs)]
        try:
            running = len(jobs)
            while running:
                place, item = await news.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield place, item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
    finally:
        for job in jobs:
            job.cancel()


async def _read(place: int, job: Job, news: asyncio.Queue[tuple[int, Update | BaseException | None]]) -> None:
    try:
        async for update in job.stream():
            news.put_nowait((place, update))
        news.put_nowait((place, None))
    except Exception as error:
        news.put_nowait((place, error))


async def gather(jobs: Sequence[Job], n: int) -> list[Answer]:
    """All answers, by question and then by choice."""
    found: dict[int, Answer] = {}
    async for place, update in updates(jobs):
        if isinstance(update, Ended):
            found[place * n + update.choice] = update.answer
    return [found[i] for i in sorted(found)]


def prompt_tokens(jobs: Sequence[Job]) -> int:
    """Tokens of all prompts; one that is answered several times counts once."""
    return sum(len(job.ask.prompt.ids) for job in jobs)


async def told(
    teller: Teller, jobs: Sequence[Job], first: tuple[int, Update], rest: AsyncIterator[tuple[int, Update]]
) -> AsyncIterator[bytes]:
    """A stream's events, several in one piece where they come together. An error is its last event."""
    sent: dict[int, str] = {}
    held: dict[int, list[Token]] = {}
    answers: list[Answer] = []
    n, hold = teller.plan.n, teller.plan.withhold

    def chunks(place: int, update: Update) -> list[dict[str, Any]]:
        if isinstance(update, Began):
            return [c for i in range(n) for c in teller.began(place * n + i, update.question)]
        index = place * n + update.choice
        before = sent.setdefault(index, "")
        if isinstance(update, Grew):
            if hold:  # its end says whether it may be shown
                held.setdefault(index, []).extend(update.tokens)
                return []
            sent[index] += "".join(token.text for token in update.tokens)
            return list(teller.grew(index, update.tokens, len(before)))
        found = []
        if hold and not update.answer.abstained:
            tokens = held.pop(index, [])
            found = list(teller.grew(index, tokens, 0))
            before = "".join(token.text for token in tokens)
        answers.append(update.answer)
        return [*found, *teller.ended(index, update.answer, before)]

    try:
        place, update = first
        if found := chunks(place, update):
            yield b"".join(map(event, found))
        async for place, update in rest:
            if found := chunks(place, update):
                yield b"".join(map(event, found))
        if teller.plan.usage:
            yield event(teller.total(prompt_tokens(jobs), answers))
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield event(fault_of(error).body)


class EventStream(Response):
    """A response of events; it ends its jobs when the client hangs up.

    Args:
        events: What is sent.
        jobs: Whose events they are.
        patience: Seconds after which a client that does not read is left alone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], jobs: Sequence[Job], patience: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # nginx waits otherwise
        del self.headers["content-length"]
        self.events, self.jobs, self.patience = events, jobs, patience

    async def __call__(self, _: Any, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            async with asyncio.timeout(self.patience):
                await unless_gone(receive, self._send(send))
        except GoneError:
            pass
        finally:
            for job in self.jobs:
                job.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self.events:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
