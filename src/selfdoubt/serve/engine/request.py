"""What a request asks of the engine, and the thread-safe channel on which its answers come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.options import Options, list_stop_texts, read_options, read_sampling
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.text.prompt import Prompt, encode

if TYPE_CHECKING:
    from selfdoubt.lm.front import LMFront
    from selfdoubt.lm.inputs import PromptLike


@dataclass(frozen=True)
class Ask:
    """What a request wants.

    Args:
        prompt: Token ids, and which of them are the question's own words.
        sampling: How tokens are chosen.
        seeds: One for each answer that is wanted.
        stops: Texts that end an answer.
        client: Who asks; clients take turns.
        timeout: Seconds from now until the request ends with ``DeadlineError``.
    """

    prompt: Prompt
    sampling: Sampling
    seeds: tuple[int, ...] = (0,)
    stops: tuple[str, ...] = ()
    client: str = ""
    timeout: float | None = None

    def length(self, context: int | None) -> int:
        """Tokens that a cache may have to hold for one answer."""
        return min(len(self.prompt.ids) + self.sampling.max_tokens, context or 2**62)


def to_ask(
    front: LMFront,
    question: PromptLike | Prompt,
    n: int,
    alternatives: int,
    client: str,
    timeout: float | None,
    options: Options,
) -> Ask:
    """What ``Engine.ask`` is asked, as data.

    Raises:
        PromptError: If the prompt is empty or the chat template refuses it.
        ConfigError: If an option is out of range.
    """
    options = read_options(options, "n", "alternatives", "client", "timeout")
    if not isinstance(question, Prompt):
        question = encode(front.tokenizer, question, raw=options.get("raw", False))
    sampling = replace(read_sampling(options, front.stop_ids), alternatives=alternatives)
    seeds = tuple(options.get("seed", 0) + i for i in range(n))
    return Ask(question, sampling, seeds, list_stop_texts(options), client, timeout)


class Began(NamedTuple):
    """The question was read; it comes once, before all else."""

    question: list[Token]  #: its own words


class Grew(NamedTuple):
    """Tokens of one answer that are certain now."""

    choice: int
    tokens: list[Token]


class Ended(NamedTuple):
    """One answer is complete."""

    choice: int
    answer: Answer


Update = Began | Grew | Ended


@dataclass(eq=False)
class Job:
    """A request on its way. One reader, in a thread (``updates``) or in an event loop (``stream``).

    Both end after the last answer, and raise what ended the request instead: ``DeadlineError``, ``EngineError``,
    ``NonFiniteError``, ... A reader who goes away calls ``cancel``.
    """

    ask: Ask
    born: float = field(default_factory=time.monotonic)
    cancelled: bool = False  #: looked at by the engine between tokens
    begun: bool = False  #: the reader has been told something
    ended: bool = False  #: nothing more will come; set by the engine
    _items: deque[Update | BaseException | None] = field(default_factory=deque)
    _news: threading.Condition = field(default_factory=threading.Condition)
    _wake: Callable[[], object] | None = None
    _on_cancel: Callable[[], object] | None = None

    @property
    def deadline(self) -> float:
        """When its time is over, by ``time.monotonic``."""
        return float("inf") if self.ask.timeout is None else self.born + self.ask.timeout

    def cancel(self) -> None:
        """Nobody reads the answers any more; their rows leave the batch before its next token."""
        self.cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()

    def on_cancel(self, act: Callable[[], object]) -> None:
        """For whoever answers elsewhere: do this when the reader goes away."""
        self._on_cancel = act
        if self.cancelled:
            act()

    def put(self, update: Update) -> None:
        """For the engine: tell the reader."""
        self.begun = True
        self._put(update)

    def end(self, error: BaseException | None = None) -> None:
        """For the engine: there is no more, or no more because of an error. Only the first call counts."""
        if not self.ended:
            self.ended = True
            self._put(error)

    def updates(self) -> Iterator[Update]:
        """What happens, as it happens; blocks between."""
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
        """What happens, as it happens, for a coroutine."""
        async for burst in self.bursts():
            for update in burst:
                yield update

    async def bursts(self) -> AsyncIterator[list[Update]]:
        """The same, with what has piled up meanwhile in one go."""
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
        """Wait for all answers, in the order of ``ask.seeds``."""
        found = {u.choice: u.answer for u in self.updates() if isinstance(u, Ended)}
        return [found[i] for i in sorted(found)]

    def _put(self, item: Update | BaseException | None) -> None:
        with self._news:
            self._items.append(item)
            self._news.notify_all()
        wake = self._wake
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # the reader's event loop is closed: nobody is there to be told
                self.cancelled = True
