"""One thread owns the model; requests come in from any other and get their answers through ``Job``."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar, Unpack

from selfdoubt.errors import BusyError, ConfigError, EngineError, PromptError
from selfdoubt.lm.model import Question, RiskAwareLM
from selfdoubt.lm.options import Options, sampling_of, stop_texts
from selfdoubt.lm.prompt import Prompt, encode
from selfdoubt.lm.stream import Stream
from selfdoubt.serve.job import Ask, Began, Ended, Grew, Job
from selfdoubt.serve.limits import Limits
from selfdoubt.serve.meter import Meter, Silent

T = TypeVar("T")


class Engine:
    """A model that many ask at once.

    Args:
        lm: The model.
        limits: How much it takes on.
        meter: Who measures it.
    """

    def __init__(self, lm: RiskAwareLM, limits: Limits | None = None, meter: Meter | None = None) -> None:
        self.lm = lm
        self.limits = limits or Limits()
        self.meter: Meter = meter or Silent()
        self._todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._closing = False
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self._thread.is_alive() and not self._closing and self.failure is None

    def ask(
        self,
        question: Question | Prompt,
        *,
        n: int = 1,
        alternatives: int = 5,
        client: str = "",
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """Ask for ``n`` answers to a question, a chat or ready-made ids; they come back through the job.

        Raises:
            PromptError: If the prompt is empty or too long.
            ConfigError: If an option is out of range.
            BusyError: If too many wait already.
            EngineError: If the engine has failed or is closing.
        """
        prompt = (
            question
            if isinstance(question, Prompt)
            else encode(self.lm.tokenizer, question, raw=options.get("raw", False))
        )
        sampling = replace(sampling_of(options, self.lm.stop_ids), alternatives=alternatives)
        if not 1 <= n <= self.limits.choices:
            raise ConfigError(f"n must be between 1 and {self.limits.choices}, got {n}")
        first = options.get("seed", 0)
        seeds = tuple(first + i for i in range(n))
        return self.submit(Ask(prompt, sampling, seeds, stop_texts(options), client, timeout))

    def submit(self, ask: Ask) -> Job:
        """See ``ask``."""
        if not self.ready:
            raise EngineError(f"the engine does not run: {self.failure or 'it is closing'}")
        if self._todo.qsize() >= self.limits.queue:
            raise BusyError(f"{self.limits.queue} requests are waiting already; try again in a moment")
        if len(ask.prompt.ids) > (self.limits.prompt_tokens or 2**62):
            raise PromptError(f"the prompt has {len(ask.prompt.ids)} tokens, more than {self.limits.prompt_tokens}")
        job = Job(ask)
        self._todo.put(job)
        return job

    def call(self, work: Callable[[RiskAwareLM], T]) -> Future[T]:
        """Let the engine's thread do something else with the model, between two tokens."""
        future: Future[T] = Future()
        self._todo.put((work, future))
        return future

    def close(self, patience: float = 30.0) -> None:
        """Take no more requests, give those that were taken so many seconds to finish, and end."""
        self._closing = True
        self._todo.put(None)
        self._thread.join(patience)

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            if isinstance(item, Job):
                try:
                    self._answer(item)
                    item.end()
                except Exception as error:
                    item.end(error)
            else:
                work, future = item
                try:
                    future.set_result(work(self.lm))
                except Exception as error:
                    future.set_exception(error)

    def _answer(self, job: Job) -> None:
        for choice, seed in enumerate(job.ask.seeds):
            stream = Stream(self.lm, job.ask.prompt, job.ask.sampling, seed, job.ask.stops)
            if choice == 0:
                job.put(Began(stream.question))
            for token in stream:
                if job.cancelled:
                    return
                job.put(Grew(choice, [token]))
            job.put(Ended(choice, stream.answer))
