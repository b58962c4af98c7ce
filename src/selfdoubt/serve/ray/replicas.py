"""More engines than one, on one machine or many: Ray Serve runs a replica an engine, and this hands requests out.

``Replicas`` stands where an ``Engine`` stands: whoever serves requests does not see the difference. A replica that dies
takes nobody with it in silence: a request of which nothing was told yet is given to another one, and any other ends
with an ``EngineError``.

This file needs the extra ``ray``; import it where it is used.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, Unpack

from selfdoubt.errors import BusyError, EngineError, require
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.options import Options
from selfdoubt.lm.scoring import TeacherForcedText
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import Ask, Ended, Grew, Job, Update, to_ask
from selfdoubt.serve.engine.stats import Meter, Silent

ray = require("ray", "ray")
serve = require("ray.serve", "ray")

T = TypeVar("T")
#: Of the application and of its deployments, in Ray.
NAME, ENGINE, FRONT = "selfdoubt", "engine", "front"
#: How often a request is given to another replica, when the one that had it has died before its first word.
TRIES = 4


class Replica:
    """One engine, in a process of its own."""

    def __init__(self, load: Callable[[], RiskAwareLM], limits: Limits) -> None:
        self._engine = Engine(load(), limits)
        self._engine.start(wait=True)

    async def answer(self, ask: Ask) -> AsyncIterator[list[Update] | Exception]:
        """Bursts of updates; what ended the request instead comes as the last item."""
        job = None
        try:
            job = self._engine.submit(ask)
            async for burst in job.bursts():
                yield [_light(update) for update in burst]
        except Exception as error:
            yield error
        finally:
            if job is not None:
                job.cancel()

    async def call(self, work: Callable[[RiskAwareLM], T]) -> T:
        """Let the engine do something else with the model."""
        return await asyncio.wrap_future(self._engine.call(work))

    async def score(self, given: Sequence[TeacherForcedText]) -> list[Answer]:
        """Score texts; whoever cancels this ends the work."""
        found = await asyncio.wrap_future(self._engine.score(given))
        return [replace(answer, states=None) for answer in found]

    async def describe(self) -> LMFront:
        """Return all that is known of the model but its weights."""
        return self._engine.front

    def check_health(self) -> None:
        """Asked by Ray: a replica whose engine has failed is replaced by a new one."""
        if not self._engine.ready:
            raise EngineError(f"the engine has failed: {self._engine.failure}")


def _light(update: Update) -> Update:
    """Hidden states stay where they are: nobody who reads answers over a network reads them."""
    return update._replace(answer=replace(update.answer, states=None)) if isinstance(update, Ended) else update


class Replicas:
    """Hands requests to replicas; see ``Engine`` for what each method means.

    Args:
        handle: Of the deployment.
        limits: Of each replica.
        meter: Is told of answers and first tokens; how full their batches are is the replicas' own affair.
    """

    def __init__(self, handle: Any, limits: Limits, meter: Meter | None = None) -> None:
        self.limits = limits
        self.meter: Meter = meter or Silent()
        self.failure: BaseException | None = None
        self._handle = handle
        self._front: LMFront | None = None
        self._jobs: set[Job] = set()
        self._closing = False
        self._lock = threading.Lock()
        self._callers = ThreadPoolExecutor(8, "selfdoubt-call")
        self._alive = 0

    @property
    def front(self) -> LMFront:
        """All that is known of the model that the replicas run, but its weights."""
        if self._front is None:  # from a thread of its own, because nobody may wait for an answer in Ray's event loop
            self._front = self._callers.submit(lambda: self._handle.describe.remote().result()).result()
        return self._front

    def start(self, *, wait: bool = False) -> None:
        """Begin to watch the replicas; with ``wait``, until one lives."""
        threading.Thread(target=self._watch, name="selfdoubt-watch", daemon=True).start()
        while wait and not self._alive:
            time.sleep(0.05)

    def _watch(self) -> None:
        while not self._closing:
            app = serve.status().applications.get(NAME)
            engine = None if app is None else app.deployments.get(ENGINE)
            self._alive = 0 if engine is None else engine.replica_states.get("RUNNING", 0)
            time.sleep(1)

    @property
    def ready(self) -> bool:
        """Whether any replica lives, as Ray knew a second ago."""
        return not self._closing and self._alive > 0

    @property
    def running(self) -> int:
        """Answers on their way, waiting ones included: which of them wait, the replicas know."""
        return sum(len(job.ask.seeds) for job in list(self._jobs))

    @property
    def waiting(self) -> int:
        """Unknown here; see ``running``."""
        return 0

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
        """See ``Engine.ask``."""
        self.limits.check(question, self.front.context)
        return self.submit(to_ask(self.front, question, n, alternatives, client, timeout, options))

    def submit(self, ask: Ask) -> Job:
        """See ``Engine.submit``."""
        job = Job(self.limits.checked(ask, self.front.context, self.front.vocabulary))
        with self._lock:
            self.check_room()
            self._jobs.add(job)
        threading.Thread(target=self._carry, args=(job,), name="selfdoubt-job", daemon=True).start()
        return job

    def check_room(self) -> None:
        """See ``Engine.check_room``."""
        if self._closing:
            raise EngineError("the server is closing")
        if len(self._jobs) >= self.limits.queue * 8:  # the replicas have limits of their own, far below
            raise BusyError(f"{len(self._jobs)} requests are on their way already; try again later")

    def call(self, work: Callable[[RiskAwareLM], T]) -> Future[T]:
        """See ``Engine.call``; ``work`` travels to a replica."""
        return self._elsewhere(self._handle.call, work)

    def score(self, given: Sequence[TeacherForcedText]) -> Future[list[Answer]]:
        """See ``Engine.score``."""
        self.limits.check_given(given, self.front.context)
        return self._elsewhere(self._handle.score, given)

    def _elsewhere(self, method: Any, argument: Any) -> Future[Any]:
        """Have a replica do something; cancelling the future cancels it there, too."""
        future: Future[Any] = Future()

        def on_any() -> Any:
            for _ in range(TRIES):
                if future.cancelled():
                    return None
                response = method.remote(argument)
                future.add_done_callback(partial(_cancel_too, response))
                try:
                    return response.result()
                except (ray.exceptions.RayActorError, serve.exceptions.ReplicaUnavailableError):
                    continue
                except serve.exceptions.BackPressureError:
                    raise _busy() from None
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
            raise _gone()

        def carry() -> None:
            try:
                outcome, failure = on_any(), None
            except BaseException as error:
                outcome, failure = None, error
            if future.set_running_or_notify_cancel():
                if failure is None:
                    future.set_result(outcome)
                else:
                    future.set_exception(failure)

        if self._closing:
            raise EngineError("the server is closing")
        self._callers.submit(carry)
        return future

    def close(self, patience: float = 30.0) -> None:
        """See ``Engine.close``; the replicas themselves are Ray's to end."""
        with self._lock:
            self._closing = True
        end = time.monotonic() + patience
        while self._jobs and time.monotonic() < end:
            time.sleep(0.02)
        for job in list(self._jobs):
            job.end(EngineError("the server is closing"))
            job.cancel()
        self._callers.shutdown(wait=False, cancel_futures=True)

    def _carry(self, job: Job) -> None:
        """Carry one request to a replica, and its answers back."""
        error: BaseException | None = _gone()
        try:
            for _ in range(TRIES):
                error = self._carry_once(job)
                if not isinstance(error, _Untold):
                    break
                error = _gone()
                time.sleep(0.2)  # the router learns of a death a moment later
        except Exception as unforeseen:
            error = unforeseen
        finally:
            with self._lock:
                self._jobs.discard(job)
            if error is not None:
                self.meter.ended("cancelled" if job.cancelled else "error", None)
            job.end(error)

    def _carry_once(self, job: Job) -> BaseException | None:
        """What ended the request, or None where its answers are complete."""
        begun = told = False
        try:
            bursts = self._handle.options(stream=True).answer.remote(job.ask)
            job.on_cancel(bursts.cancel)
            for burst in bursts:
                if isinstance(burst, Exception):
                    return burst
                for update in burst:
                    if isinstance(update, Grew):
                        if not told:
                            self.meter.first_token(time.monotonic() - job.born)
                        told = True
                        self.meter.grew(len(update.tokens))
                    elif isinstance(update, Ended):
                        self.meter.ended("length" if update.answer.finish == "length" else "stop", update.answer)
                    elif begun or job.begun:
                        continue  # by the replica that died before its first word
                    begun = True
                    job.put(update)
        except (ray.exceptions.RayActorError, serve.exceptions.ReplicaUnavailableError):
            return _gone() if told or job.cancelled else _Untold()
        except serve.exceptions.BackPressureError:
            return _busy()
        except (ray.exceptions.TaskCancelledError, serve.exceptions.RequestCancelledError, CancelledError):
            return _gone()
        return None


def _cancel_too(response: Any, done: Future[Any]) -> None:
    if done.cancelled():
        response.cancel()


class _Untold(Exception):  # noqa: N818
    """A replica died before it said a word."""


def _gone() -> EngineError:
    return EngineError("the replica that had this request has died; ask again")


def _busy() -> BusyError:
    return BusyError("every replica is busy, and enough requests wait already; try again later")
