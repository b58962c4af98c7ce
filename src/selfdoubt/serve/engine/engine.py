"""Continuous batching: one thread owns the model, and requests join and leave its batch between two tokens.

Requests come in from any thread and get their answers through ``Job``. Each turn of the engine reads one piece of the
newcomers' prompts, or of a text to score, and chooses one token for every running sequence. Pieces are sized by the
time they take, so that neither a long prompt nor a long text holds anybody up. What goes wrong with one request ends
that request: a batch that failed is taken apart, and its sequences are read again one by one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, Unpack

from selfdoubt.errors import BusyError, EngineError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.options import Options
from selfdoubt.lm.scoring import TeacherForcedText, score_in_chunks
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.prefills import LONG
from selfdoubt.serve.engine.queue import Waiting
from selfdoubt.serve.engine.request import Ask, Job, to_ask
from selfdoubt.serve.engine.scheduler import InFlight
from selfdoubt.serve.engine.stats import Meter, Silent
from selfdoubt.serve.engine.tasks import Errand, Errands

T = TypeVar("T")
#: After so many requests in a row that failed in the model, the engine looks whether the model itself still works.
LAST_STRAW = 5


class Engine:
    """A model that many ask at once.

    Args:
        lm: The model. Nobody else may use it while the engine runs.
        limits: How much it takes on.
        meter: Who measures it.
        clock: Measures how long pieces of work take, in seconds.
    """

    def __init__(
        self,
        lm: RiskAwareLM,
        limits: Limits | None = None,
        meter: Meter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.lm = lm
        self.limits = limits or Limits()
        self.meter: Meter = meter or Silent()
        self.failure: BaseException | None = None  #: what ended the engine
        self._inflight = InFlight(lm, self.limits, self.meter, clock)
        self._waiting = Waiting()
        self._errands = Errands()
        self._was_errand = False  # whose the last piece was
        self._news = threading.Condition(threading.RLock())  # guards the three above and the flags below
        self._warm = self._closing = self._aborting = False
        self._thread = threading.Thread(target=self._run, name="selfdoubt-engine", daemon=True)

    def start(self, *, wait: bool = False) -> None:
        """Begin to answer; the model takes its first steps before the engine is ``ready``.

        Args:
            wait: Until that is so.

        Raises:
            EngineError: With ``wait``, if the model cannot take them.
        """
        self._thread.start()
        if wait:
            with self._news:
                self._news.wait_for(lambda: self._warm or self.failure is not None)
            if self.failure is not None:
                raise self._error()

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, but for a full queue."""
        return self._warm and not self._closing and self.failure is None and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Sequences that are being read or decoded now."""
        return self._inflight.size

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return len(self._waiting)

    @property
    def front(self) -> LMFront:
        """All that is known of the model but its weights."""
        return self.lm.front

    def ask(
        self,
        question: PromptLike | Prompt,
        *,
        n: int = 1,
        alternatives: int = 5,
        client: str = "",
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """Ask for ``n`` answers; they come back through the job.

        Args:
            question: A question, a chat, or ready-made token ids.
            n: How many answers, with the seeds ``seed``, ``seed + 1``, ...
            alternatives: How many of the most probable tokens are told with each token.
            client: Who asks; clients take turns.
            timeout: Seconds that it may take, waiting included; at most the limit's.
            **options: See ``Options``.

        Raises:
            PromptError: If the prompt is empty or too long.
            ConfigError: If an option is out of range.
            BusyError: If too many wait already.
            EngineError: If the engine has failed or is closing.
        """
        self.limits.check(question, self.front.context)
        ask = to_ask(self.front, question, n, alternatives, client, timeout, options)
        return self.submit(ask)

    def submit(self, ask: Ask) -> Job:
        """See ``ask``."""
        job = Job(self.limits.checked(ask, self.front.context, self.front.vocabulary))
        with self._news:
            self.check_room()
            self._waiting.add(job)
            self.meter.waiting(len(self._waiting))
            self._news.notify_all()
        return job

    def check_room(self) -> None:
        """Nothing, if a request would be taken.

        Raises:
            BusyError: If too many wait already.
            EngineError: If the engine has failed or is closing.
        """
        with self._news:
            self._check_open()
            if len(self._waiting) >= self.limits.queue:
                raise BusyError(
                    f"{self.limits.queue} requests are waiting already, which is this server's limit; try again later",
                    retry_after=min(60.0, max(1.0, self._inflight.pace * len(self._waiting))),
                )

    def call(self, work: Callable[[RiskAwareLM], T]) -> Future[T]:
        """Let the engine's thread do something else with the model, between two tokens.

        Raises:
            BusyError: If too many wait already.
            EngineError: If the engine has failed or is closing.
        """
        return self._add(Errand(lambda lm, _: work(lm)))

    def score(self, given: Sequence[TeacherForcedText]) -> Future[list[Answer]]:
        """Score texts side by side, in pieces between tokens of others. Cancelling the future ends the work.

        Args:
            given: From ``encode_given``.

        Raises:
            PromptError: If a text is too long.
            BusyError: If too many wait already.
            EngineError: If the engine has failed or is closing.
        """
        tokens = self.limits.check_given(given, self.front.context)
        return self._add(Errand(lambda lm, sizer: score_in_chunks(lm, given, 0, sizer), is_long=tokens > LONG))

    def _add(self, errand: Errand) -> Future[Any]:
        with self._news:
            self._check_open()
            if len(self._errands) >= self.limits.queue:
                raise BusyError(f"{self.limits.queue} texts are waiting to be scored already; try again later")
            self._errands.add(errand)
            self._news.notify_all()
        return errand.future

    def close(self, patience: float = 30.0) -> None:
        """Take no more requests, give those that were taken so many seconds to finish, and end.

        What has not finished by then ends with ``EngineError``.
        """
        with self._news:
            self._closing = True
            self._news.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)
        self._aborting = True
        if self._thread.is_alive():
            self._thread.join()

    def _check_open(self) -> None:
        if self._closing or self.failure is not None or not self._thread.is_alive():
            raise self._error()

    def _error(self) -> EngineError:
        if self.failure is not None:
            return EngineError(f"the engine has failed ({type(self.failure).__name__}: {self.failure}); start it again")
        return EngineError("the engine is closing" if self._closing else "the engine does not run; start it")

    def _run(self) -> None:
        """The engine's thread."""
        try:
            self._inflight.rehearse()
            with self._news:
                self._warm = True
                self._news.notify_all()
            while self._turn():
                if self._inflight.misfortunes >= LAST_STRAW:
                    self._inflight.rehearse()
        except BaseException as error:
            self.failure = error
        self._end_all()

    def _turn(self) -> bool:
        """One piece of prompts or of an errand, one token each; False when all is done and the engine closes."""
        with self._news:
            while not (self._waiting or self._errands or self._inflight.size or self._closing):
                self._news.wait()
            if self._aborting or (self._closing and not (self._waiting or self._errands or self._inflight.size)):
                return False
            dropped = self._waiting.remove(self._inflight.is_over)
            newcomers = self._inflight.admit(self._waiting)
            if newcomers or dropped:
                self.meter.waiting(len(self._waiting))
            # Prompts and texts to score take turns, too: a step of the others waits for one piece at most.
            is_theirs = self._was_errand and (newcomers or self._inflight.is_reading)
            errand = None if is_theirs else self._errands.next()  # asked only for who works: it goes behind the others
        for job in dropped:
            self._inflight.end(job)
        self._was_errand = errand is not None
        if errand is not None:
            with self._inflight.piece() as sizer:
                ended = errand.advance(self.lm, sizer)
            if ended:
                with self._news:
                    self._errands.remove(errand)
        self._inflight.work(newcomers, reads=not self._was_errand)
        return True

    def _end_all(self) -> None:
        with self._news:
            self._closing = True
            left = self._waiting.remove(lambda _: True)
            errands, self._aborting = self._errands.clear(), True
            self._news.notify_all()
        error = self._error()
        self._inflight.end_all(error)
        for job in left:
            job.end(error)
        for errand in errands:
            errand.fail(error)
