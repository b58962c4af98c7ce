"""Requests to the engine, and the thread-safe handles through which their answers come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from selfdoubt.lm import defaults
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.options import Options, list_stop_texts, read_options, read_sampling
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.text.prompt import Prompt, encode

if TYPE_CHECKING:
    from selfdoubt.lm.front import LMFront
    from selfdoubt.lm.inputs import PromptLike


@dataclass(frozen=True)
class GenerationRequest:
    """A request for one or several answers to one prompt, as the engine takes it.

    Args:
        prompt: Token ids, with the user's tokens marked.
        sampling: Settings by which tokens are chosen.
        seeds: One seed per answer.
        stops: Texts that end an answer.
        client: Name of the client; clients take turns.
        timeout: Seconds from its arrival until the request ends with ``DeadlineError``; None sets no deadline.
    """

    prompt: Prompt
    sampling: Sampling
    seeds: tuple[int, ...] = (0,)
    stops: tuple[str, ...] = ()
    client: str = ""
    timeout: float | None = None

    def max_length(self, context: int | None) -> int:
        """Return the number of tokens that a cache may have to hold for one answer."""
        return min(len(self.prompt.ids) + self.sampling.max_tokens, context or 2**62)


def build_request(
    front: LMFront,
    prompt: PromptLike | Prompt,
    options: Options,
    *,
    n: int = 1,
    alternatives: int = defaults.ALTERNATIVES,
    client: str = "",
    timeout: float | None = None,
) -> GenerationRequest:
    """Build a request from a caller's options; see ``EngineClient.generate``.

    Raises:
        PromptError: If the prompt is empty or the chat template refuses it.
        ConfigError: If an option is out of range.
    """
    options = read_options(options, "n", "alternatives", "client", "timeout")
    if not isinstance(prompt, Prompt):
        prompt = encode(front.tokenizer, prompt, raw=options.get("raw", False))
    sampling = replace(read_sampling(options, front.stop_ids), alternatives=alternatives)
    return GenerationRequest(
        prompt, sampling, list_seeds(options.get("seed", 0), n), list_stop_texts(options), client, timeout
    )


def list_seeds(seed: int, n: int) -> tuple[int, ...]:
    """Return the seeds of ``n`` answers: they count on from the first."""
    return tuple(seed + i for i in range(n))


class Started(NamedTuple):
    """The update that a prompt was read; it comes once, before all others."""

    question: list[Token]  #: the user's tokens of the question
    p_answerable: float | None = None  #: as ``Answer.p_answerable``


class TokensAdded(NamedTuple):
    """The update that tokens of one answer are certain now."""

    choice: int
    tokens: list[Token]


class Finished(NamedTuple):
    """The update that one answer is complete."""

    choice: int
    answer: Answer


Update = Started | TokensAdded | Finished


@dataclass(eq=False)
class RequestHandle:
    """A request in progress. It has one reader, in a thread (``updates``) or in an event loop (``stream``).

    Both end after the last answer, and raise the error that ended the request early: ``DeadlineError``,
    ``EngineError``, ``NonFiniteError``, ... A reader that goes away calls ``cancel``.
    """

    request: GenerationRequest
    arrived_at: float = field(default_factory=time.monotonic)
    cancelled: bool = False  #: the engine looks at it between tokens
    started: bool = False  #: the reader got an update
    ended: bool = False  #: nothing more will come; set by the engine
    _items: deque[Update | BaseException | None] = field(default_factory=deque)
    _news: threading.Condition = field(default_factory=threading.Condition)
    _wake: Callable[[], object] | None = None
    _on_cancel: Callable[[], object] | None = None

    @property
    def deadline(self) -> float:
        """The end of its time, by ``time.monotonic``."""
        return float("inf") if self.request.timeout is None else self.arrived_at + self.request.timeout

    def cancel(self) -> None:
        """End the request, whose reader has gone; its rows leave the batch before the next token."""
        self.cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()

    def on_cancel(self, act: Callable[[], object]) -> None:
        """Register a function to call when the request is cancelled, for a request that another process answers."""
        self._on_cancel = act
        if self.cancelled:
            act()

    def publish(self, update: Update) -> None:
        """Send an update to the reader; for the engine."""
        self.started = True
        self._put(update)

    def finish(self, error: BaseException | None = None) -> None:
        """End the updates, with an error if there is one; for the engine. Only the first call counts."""
        if not self.ended:
            self.ended = True
            self._put(error)

    def updates(self) -> Iterator[Update]:
        """Yield updates as they come; blocks between them."""
        while True:
            with self._news:
                while not self._items:
                    self._news.wait()
                item = self._items.popleft()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    async def stream(self) -> AsyncIterator[Update]:
        """Yield updates as they come, for a coroutine."""
        async for burst in self.bursts():
            for update in burst:
                yield update

    async def bursts(self) -> AsyncIterator[list[Update]]:
        """Yield lists of updates, each of those that have piled up since the last one."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(news.set)
        while True:
            burst: list[Update] = []
            while self._items:
                item = self._items.popleft()
                if item is None or isinstance(item, BaseException):
                    if burst:
                        yield burst
                    if item is None:
                        return
                    raise item
                burst.append(item)
            if burst:
                yield burst
            news.clear()
            if not self._items:
                await news.wait()

    def answers(self) -> list[Answer]:
        """Wait for all answers, in the order of ``request.seeds``."""
        answers = {u.choice: u.answer for u in self.updates() if isinstance(u, Finished)}
        return [answers[i] for i in sorted(answers)]

    def _put(self, item: Update | BaseException | None) -> None:
        with self._news:
            self._items.append(item)
            self._news.notify_all()
        wake = self._wake
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # the reader's event loop is closed: it reads no more
                self.cancelled = True


@contextmanager
def cancel_on_exit(handles: Iterable[RequestHandle]) -> Iterator[None]:
    """Cancel requests when the block ends, in whatever way; those that have ended are not affected.

    Args:
        handles: Iterated when the block ends: handles that were added to it within count, those removed do not.
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.cancel()
