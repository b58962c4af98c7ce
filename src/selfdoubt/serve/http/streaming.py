"""Collects or streams the answers of request handles as a reply; a client that hangs up cancels them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from starlette.responses import Response

from selfdoubt.lm.answer import Answer, Token
from selfdoubt.serve.engine.request import Finished, RequestHandle, Started, TokensAdded, Update, cancel_on_exit
from selfdoubt.serve.http.asgi import Receive, Send
from selfdoubt.serve.openai.errors import ClientDisconnectedError, to_request_error
from selfdoubt.serve.openai.format import ResponseFormatter, format_event

T = TypeVar("T")


async def run_until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Return the outcome of some work, which is cancelled when the client hangs up.

    Raises:
        ClientDisconnectedError: If the client hung up first.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge_updates(handles: Sequence[RequestHandle]) -> AsyncIterator[tuple[int, Update]]:
    """Yield the updates of several handles as they come, each with the handle's place.

    The handles are cancelled when the caller stops reading, and when one of them ends with an error.
    """
    with cancel_on_exit(handles):
        if len(handles) == 1:
            async for update in handles[0].stream():
                yield 0, update
            return
        news: asyncio.Queue[tuple[int, Update | BaseException | None]] = asyncio.Queue()
        readers = [asyncio.ensure_future(_read(i, handle, news)) for i, handle in enumerate(handles)]
        try:
            running = len(handles)
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


async def _read(
    place: int, handle: RequestHandle, news: asyncio.Queue[tuple[int, Update | BaseException | None]]
) -> None:
    try:
        async for update in handle.stream():
            news.put_nowait((place, update))
        news.put_nowait((place, None))
    except Exception as error:
        news.put_nowait((place, error))


async def collect_answers(handles: Sequence[RequestHandle], n: int) -> list[Answer]:
    """Wait for all answers; return them by prompt and then by choice."""
    answers: dict[int, Answer] = {}
    async for place, update in merge_updates(handles):
        if isinstance(update, Finished):
            answers[place * n + update.choice] = update.answer
    return [answers[i] for i in sorted(answers)]


def count_prompt_tokens(handles: Sequence[RequestHandle]) -> int:
    """Return the number of tokens of all prompts; one that is answered several times counts once."""
    return sum(len(handle.request.prompt.ids) for handle in handles)


async def stream_events(
    formatter: ResponseFormatter,
    prompt_tokens: int,
    first: tuple[int, Update],
    rest: AsyncIterator[tuple[int, Update]],
) -> AsyncIterator[bytes]:
    """Yield the events of a stream, several in one piece if they come together. An error is its last event."""
    sent: dict[int, str] = {}
    held: dict[int, list[Token]] = {}
    answers: list[Answer] = []
    n, hold = len(formatter.params.seeds), formatter.params.hide_abstained

    def format_update(place: int, update: Update) -> list[dict[str, Any]]:
        if isinstance(update, Started):
            return [
                c for i in range(n) for c in formatter.format_start(place * n + i, update.question, update.p_answerable)
            ]
        index = place * n + update.choice
        before = sent.setdefault(index, "")
        if isinstance(update, TokensAdded):
            if hold:  # the answer's end says whether it may be shown
                held.setdefault(index, []).extend(update.tokens)
                return []
            sent[index] += "".join(token.text for token in update.tokens)
            return list(formatter.format_tokens(index, update.tokens, len(before)))
        chunks = []
        if hold and not formatter.is_hidden(update.answer):
            tokens = held.pop(index, [])
            chunks = list(formatter.format_tokens(index, tokens, 0))
            before = "".join(token.text for token in tokens)
        answers.append(update.answer)
        return [*chunks, *formatter.format_end(index, update.answer, before)]

    try:
        place, update = first
        if chunks := format_update(place, update):
            yield b"".join(map(format_event, chunks))
        async for place, update in rest:
            if chunks := format_update(place, update):
                yield b"".join(map(format_event, chunks))
        if formatter.params.include_usage:
            yield format_event(formatter.format_usage(prompt_tokens, answers))
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield format_event(to_request_error(error).body)


class EventStream(Response):
    """A response of events; it cancels its requests when the client hangs up.

    Args:
        events: The events.
        handles: The requests that they come from.
        patience: Seconds after which a client that does not read is cut off.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], handles: Sequence[RequestHandle], patience: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # nginx waits otherwise
        del self.headers["content-length"]
        self.events, self.handles, self.patience = events, handles, patience

    async def __call__(self, _: Any, receive: Receive, send: Send) -> None:
        """Send the events; see ASGI."""
        with cancel_on_exit(self.handles):
            try:
                async with asyncio.timeout(self.patience):
                    await run_until_disconnect(receive, self._send(send))
            except ClientDisconnectedError:
                pass

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self.events:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
