"""Continuous batching: one thread owns the model, and requests join and leave its batch between two tokens.

Requests come in from any thread and get their answers through ``RequestHandle``. Each turn of the engine reads one
chunk of new prompts, or of a text to score, and chooses one token for every running sequence. Chunks are sized by the
time they take, so that neither a long prompt nor a long text holds up the others. An error in one request ends that
request: a batch that failed is taken apart, and its sequences are read again one by one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from selfdoubt.errors import BusyError, EngineError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.decoding import StepMemory, measure_step_memory
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.scoring import TeacherForcedText, score_in_chunks
from selfdoubt.serve.engine.client import EngineClient
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.prefills import LONG_TEXT
from selfdoubt.serve.engine.queue import FairQueue
from selfdoubt.serve.engine.request import GenerationRequest, RequestHandle
from selfdoubt.serve.engine.scheduler import Scheduler
from selfdoubt.serve.engine.stats import EngineStats, NullStats
from selfdoubt.serve.engine.tasks import EngineTask, TaskQueue

T = TypeVar("T")
#: After this many requests in a row that failed in the model, the engine checks whether the model itself still works.
MAX_CONSECUTIVE_FAILURES = 5


class Engine(EngineClient):
    """A model that serves many requests at once.

    Args:
        lm: The model. It must not be used elsewhere while the engine runs.
        limits: Limits on requests.
        stats: Receiver of events, to count and measure them; None counts nothing.
        clock: Function that returns seconds, to time chunks of work.
    """

    def __init__(
        self,
        lm: RiskAwareLM,
        limits: Limits | None = None,
        stats: EngineStats | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.lm = lm
        self.limits = limits or Limits()
        self.stats: EngineStats = stats or NullStats()
        self.failure: BaseException | None = None  #: the error that ended the engine
        self._scheduler = Scheduler(lm, self.limits, self.stats, clock)
        self._queue = FairQueue()
        self._tasks = TaskQueue()
        self._holds = 0  # requests that will send more texts to score
        self._was_task = False  # the last chunk was a task's
        self._news = threading.Condition(threading.RLock())  # guards the five above and the flags below
        self._warm = self._closing = self._aborting = False
        self._thread = threading.Thread(target=self._run, name="selfdoubt-engine", daemon=True)

    def start(self, *, wait: bool = False) -> None:
        """Start the engine; the model takes its first steps before the engine is ``ready``.

        Args:
            wait: Return when it is ready.

        Raises:
            EngineError: With ``wait``, if the model cannot take those steps.
        """
        self._thread.start()
        if wait:
            with self._news:
                self._news.wait_for(lambda: self._warm or self.failure is not None)
            if self.failure is not None:
                raise self._error()

    @property
    def ready(self) -> bool:
        """True if a request would be accepted, unless the queue is full."""
        return self._warm and not self._closing and self.failure is None and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Number of sequences that are prefilled or decoded now."""
        return self._scheduler.size

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @property
    def step_memory(self) -> StepMemory:
        """Memory of static caches and captured graphs."""
        return measure_step_memory(self.lm)

    @property
    def front(self) -> LMFront:
        """Everything about the model except its weights."""
        return self.lm.front

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Submit a request that is encoded already; see ``EngineClient.generate``."""
        handle = RequestHandle(self.limits.apply(request, self.front.context, self.front.vocabulary))
        with self._news:
            self.check_capacity()
            self._queue.add(handle)
            self.stats.set_waiting(len(self._queue))
            self._news.notify_all()
        return handle

    def check_capacity(self) -> None:
        """Check that a request would be accepted.

        Raises:
            BusyError: If the queue is full.
            EngineError: If the engine has failed or is closing.
        """
        with self._news:
            self._check_open()
            if len(self._queue) >= self.limits.queue:
                raise BusyError(
                    f"{self.limits.queue} requests are waiting already, which is this server's limit; try again later",
                    retry_after=min(60.0, max(1.0, self._scheduler.seconds_per_request * len(self._queue))),
                )

    def call(self, work: Callable[[RiskAwareLM], T]) -> Future[T]:
        """Run other work with the model in the engine's thread, between two tokens.

        Raises:
            BusyError: If the queue is full.
            EngineError: If the engine has failed or is closing.
        """
        return self._add(EngineTask(lambda lm, _: work(lm)))

    @contextmanager
    def hold_open(self) -> Iterator[None]:
        """Accept texts to score until the block ends, also while the engine is closing.

        For a request whose texts come in several groups: once its first group is accepted, so are the others.

        Raises:
            EngineError: If the engine has failed or is closing already.
        """
        with self._news:
            self._check_open()
            self._holds += 1
        try:
            yield
        finally:
            with self._news:
                self._holds -= 1
                self._news.notify_all()

    def score(self, texts: Sequence[TeacherForcedText]) -> Future[list[Answer]]:
        """Score texts side by side, in chunks between tokens of others. Cancelling the future ends the work.

        Args:
            texts: Texts to score, from ``encode_teacher_forced``.

        Raises:
            PromptError: If a text is too long.
            BusyError: If the queue is full.
            EngineError: If the engine has failed, or is closing and not held open.
        """
        tokens = self.limits.check_scored_texts(texts, self.front.context)
        task = EngineTask(lambda lm, sizer: score_in_chunks(lm, texts, 0, sizer), is_long=tokens > LONG_TEXT)
        return self._add(task, is_held=self._holds > 0)

    def _add(self, task: EngineTask, *, is_held: bool = False) -> Future[Any]:
        with self._news:
            self._check_open(is_held=is_held)
            if len(self._tasks) >= self.limits.queue:
                raise BusyError(f"{self.limits.queue} texts are waiting to be scored already; try again later")
            self._tasks.add(task)
            self._news.notify_all()
        return task.future

    def close(self, patience: float = 30.0) -> None:
        """Accept no more requests, and end when those accepted have finished.

        Args:
            patience: Seconds until those still running end with ``EngineError``.
        """
        with self._news:
            self._closing = True
            self._news.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)
        with self._news:
            self._aborting = True
            self._news.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _check_open(self, *, is_held: bool = False) -> None:
        if self._aborting or (self._closing and not is_held) or self.failure is not None or not self._thread.is_alive():
            raise self._error()

    def _error(self) -> EngineError:
        if self.failure is not None:
            return EngineError(f"the engine has failed ({type(self.failure).__name__}: {self.failure}); start it again")
        return EngineError(
            "the engine is closing" if self._closing or self._aborting else "the engine does not run; start it"
        )

    def _run(self) -> None:
        """Run the engine's thread."""
        try:
            self._scheduler.warm_up()
            with self._news:
                self._warm = True
                self._news.notify_all()
            while self._turn():
                if self._scheduler.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
                    self._scheduler.warm_up()
        except BaseException as error:
            self.failure = error
        self._end_all()

    @property
    def _has_work(self) -> bool:
        return bool(self._queue or self._tasks or self._scheduler.size)

    def _turn(self) -> bool:
        """Do one chunk of prompts or of a task, and one token each; return False when all is done and it closes."""
        with self._news:
            while not (self._has_work or self._aborting or (self._closing and not self._holds)):
                self._news.wait()
            if self._aborting or not self._has_work:
                return False
            dropped = self._queue.remove(self._scheduler.is_over)
            newcomers = self._scheduler.admit(self._queue)
            if newcomers or dropped:
                self.stats.set_waiting(len(self._queue))
            # Prompts and texts to score take turns, too: a step of the others waits for one chunk at most.
            is_prefill_turn = self._was_task and (newcomers or self._scheduler.is_prefilling)
            task = None if is_prefill_turn else self._tasks.next()  # only if it works: it goes behind the others
        for handle in dropped:
            self._scheduler.end_request(handle)
        self._was_task = task is not None
        if task is not None:
            with self._scheduler.timed_chunk() as sizer:
                has_ended = task.advance(self.lm, sizer)
            if has_ended:
                with self._news:
                    self._tasks.remove(task)
        self._scheduler.work(newcomers, prefills=not self._was_task)
        return True

    def _end_all(self) -> None:
        with self._news:
            self._closing = True
            left = self._queue.remove(lambda _: True)
            tasks, self._aborting = self._tasks.clear(), True
            self._news.notify_all()
        error = self._error()
        self._scheduler.end_all(error)
        for handle in left:
            handle.finish(error)
        for task in tasks:
            task.fail(error)
