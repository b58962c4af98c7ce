"""Several engines, on one machine or many: Ray Serve runs one replica per engine, and this distributes requests.

``Replicas`` is an ``EngineClient``, as an ``Engine`` is. A replica that dies loses no request in silence: one whose
reader got nothing yet is given to another replica, and any other ends with an ``EngineError``.

This file needs the extra ``ray``; import it where it is used.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from selfdoubt.errors import BusyError, EngineError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.scoring import TeacherForcedText
from selfdoubt.serve.engine.client import EngineClient
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import (
    Finished,
    GenerationRequest,
    RequestHandle,
    TokensAdded,
    Update,
    cancel_on_exit,
)
from selfdoubt.serve.engine.stats import EngineStats, NullStats, Outcome
from selfdoubt.serve.ray.library import ray, ray_serve

T = TypeVar("T")
#: Names of the application and of its deployments, in Ray.
APP_NAME, ENGINE_NAME, FRONT_NAME = "selfdoubt", "engine", "front"
#: Replicas that a request is given to, one after the other, if they die before its first token.
MAX_REPLICA_ATTEMPTS = 4


class Replica:
    """One engine, in a process of its own."""

    def __init__(self, load: Callable[[], RiskAwareLM], limits: Limits) -> None:
        self._engine = Engine(load(), limits)
        self._engine.start(wait=True)

    async def answer(self, request: GenerationRequest) -> AsyncIterator[list[Update] | Exception]:
        """Yield bursts of updates; an error that ends the request comes as the last item."""
        try:
            handle = self._engine.submit(request)
            with cancel_on_exit([handle]):
                async for burst in handle.bursts():
                    yield [_without_states(update) for update in burst]
        except Exception as error:
            yield error

    async def call(self, work: Callable[[RiskAwareLM], T]) -> T:
        """Let the engine do other work with the model."""
        return await asyncio.wrap_future(self._engine.call(work))

    async def score(self, texts: Sequence[TeacherForcedText]) -> list[Answer]:
        """Score texts; cancelling this ends the work."""
        answers = await asyncio.wrap_future(self._engine.score(texts))
        return [replace(answer, states=None) for answer in answers]

    async def describe(self) -> LMFront:
        """Return everything about the model except its weights."""
        return self._engine.front

    def check_health(self) -> None:
        """Raise an error if the engine has failed; Ray calls this, and replaces the replica by a new one."""
        if not self._engine.ready:
            raise EngineError(f"the engine has failed: {self._engine.failure}")


def _without_states(update: Update) -> Update:
    """Return an update without hidden states: readers of answers over a network do not read them."""
    return update._replace(answer=replace(update.answer, states=None)) if isinstance(update, Finished) else update


class Replicas(EngineClient):
    """A client that distributes requests among replicas; ``Engine`` explains the methods.

    Args:
        deployment: Ray's handle of the deployment.
        limits: Limits of each replica.
        stats: Receives answers and first tokens; only the replicas know the sizes of their batches.
    """

    def __init__(self, deployment: Any, limits: Limits, stats: EngineStats | None = None) -> None:
        self.limits = limits
        self.stats: EngineStats = stats or NullStats()
        self.failure: BaseException | None = None
        self._deployment = deployment
        self._front: LMFront | None = None
        self._handles: set[RequestHandle] = set()
        self._holds = 0  # requests that will send more texts to score
        self._closing = False
        self._lock = threading.Lock()
        self._callers = ThreadPoolExecutor(8, "selfdoubt-call")
        self._alive = 0

    @property
    def front(self) -> LMFront:
        """Everything about the model that the replicas run, except its weights."""
        if self._front is None:  # in a thread of its own, because waiting would block Ray's event loop
            self._front = self._callers.submit(lambda: self._deployment.describe.remote().result()).result()
        return self._front

    def start(self, *, wait: bool = False) -> None:
        """Begin to watch the replicas; with ``wait``, return when one runs."""
        threading.Thread(target=self._watch, name="selfdoubt-watch", daemon=True).start()
        while wait and not self._alive:
            time.sleep(0.05)

    def _watch(self) -> None:
        while not self._closing:
            app = ray_serve.status().applications.get(APP_NAME)
            engine = None if app is None else app.deployments.get(ENGINE_NAME)
            self._alive = 0 if engine is None else engine.replica_states.get("RUNNING", 0)
            time.sleep(1)

    @property
    def ready(self) -> bool:
        """True if any replica runs, as Ray knew a second ago."""
        return not self._closing and self._alive > 0

    @property
    def running(self) -> int:
        """Number of answers in progress, waiting ones included: only the replicas know which wait."""
        return sum(len(handle.request.seeds) for handle in list(self._handles))

    @property
    def waiting(self) -> int:
        """Zero: the number is not known here; see ``running``."""
        return 0

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Submit a request; see ``Engine.submit``."""
        handle = RequestHandle(self.limits.apply(request, self.front.context, self.front.vocabulary))
        with self._lock:
            self.check_capacity()
            self._handles.add(handle)
        threading.Thread(target=self._carry, args=(handle,), name="selfdoubt-request", daemon=True).start()
        return handle

    def check_capacity(self) -> None:
        """Check that a request would be accepted; see ``Engine.check_capacity``."""
        self._check_open()
        if len(self._handles) >= self.limits.queue * 8:  # the replicas have limits of their own, far below
            raise BusyError(f"{len(self._handles)} requests are in progress already; try again later")

    def call(self, work: Callable[[RiskAwareLM], T]) -> Future[T]:
        """Run other work with the model, in a replica; see ``Engine.call``."""
        return self._call_replica(self._deployment.call, work)

    @contextmanager
    def hold_open(self) -> Iterator[None]:
        """Accept texts to score until the block ends; see ``Engine.hold_open``."""
        with self._lock:
            self._check_open()
            self._holds += 1
        try:
            yield
        finally:
            with self._lock:
                self._holds -= 1

    def score(self, texts: Sequence[TeacherForcedText]) -> Future[list[Answer]]:
        """Score texts; see ``Engine.score``."""
        self.limits.check_scored_texts(texts, self.front.context)
        return self._call_replica(self._deployment.score, texts, is_held=self._holds > 0)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineError("the server is closing")

    def _call_replica(self, method: Any, argument: Any, *, is_held: bool = False) -> Future[Any]:
        """Call a method of a replica; cancelling the future cancels it there, too."""
        future: Future[Any] = Future()

        def call_any() -> Any:
            for _ in range(MAX_REPLICA_ATTEMPTS):
                if future.cancelled():
                    return None
                response = method.remote(argument)
                future.add_done_callback(partial(_cancel_too, response))
                try:
                    return response.result()
                except (ray.exceptions.RayActorError, ray_serve.exceptions.ReplicaUnavailableError):
                    continue
                except ray_serve.exceptions.BackPressureError:
                    raise _busy() from None
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
            raise _died()

        def carry() -> None:
            try:
                outcome, failure = call_any(), None
            except BaseException as error:
                outcome, failure = None, error
            if future.set_running_or_notify_cancel():
                if failure is None:
                    future.set_result(outcome)
                else:
                    future.set_exception(failure)

        if not is_held:
            self._check_open()
        self._callers.submit(carry)
        return future

    def close(self, patience: float = 30.0) -> None:
        """Accept no more requests, and let those accepted finish; Ray ends the replicas themselves."""
        with self._lock:
            self._closing = True
        end = time.monotonic() + patience
        while (self._handles or self._holds) and time.monotonic() < end:
            time.sleep(0.02)
        for handle in list(self._handles):
            handle.finish(EngineError("the server is closing"))
            handle.cancel()
        self._callers.shutdown(wait=False, cancel_futures=True)

    def _carry(self, handle: RequestHandle) -> None:
        """Carry one request to a replica, and its answers back."""
        error: BaseException | None = _died()
        try:
            for _ in range(MAX_REPLICA_ATTEMPTS):
                error = self._carry_to_one(handle)
                if not isinstance(error, _NotStartedError):
                    break
                error = _died()
                time.sleep(0.2)  # the router learns of a death a moment later
        except Exception as unforeseen:
            error = unforeseen
        finally:
            with self._lock:
                self._handles.discard(handle)
            if error is not None:
                self.stats.record_end("cancelled" if handle.cancelled else "error", None)
            handle.finish(error)

    def _carry_to_one(self, handle: RequestHandle) -> BaseException | None:
        """Carry a request to one replica; return the error that ended it, or None if its answers are complete."""
        has_update = has_token = False
        try:
            bursts = self._deployment.options(stream=True).answer.remote(handle.request)
            handle.on_cancel(bursts.cancel)
            for burst in bursts:
                if isinstance(burst, Exception):
                    return burst
                for update in burst:
                    if isinstance(update, TokensAdded):
                        if not has_token:
                            self.stats.record_first_token(time.monotonic() - handle.arrived_at)
                        has_token = True
                        self.stats.record_tokens(len(update.tokens))
                    elif isinstance(update, Finished):
                        outcome: Outcome = "length" if update.answer.finish == "length" else "stop"
                        self.stats.record_end(outcome, update.answer)
                    elif has_update or handle.started:
                        continue  # sent by the replica that died before its first token
                    has_update = True
                    handle.publish(update)
        except (ray.exceptions.RayActorError, ray_serve.exceptions.ReplicaUnavailableError):
            return _died() if has_token or handle.cancelled else _NotStartedError()
        except ray_serve.exceptions.BackPressureError:
            return _busy()
        except (ray.exceptions.TaskCancelledError, ray_serve.exceptions.RequestCancelledError, CancelledError):
            return _died()
        return None


def _cancel_too(response: Any, done: Future[Any]) -> None:
    if done.cancelled():
        response.cancel()


class _NotStartedError(Exception):
    """A replica died before it sent a token."""


def _died() -> EngineError:
    return EngineError("the replica that had this request has died; send it again")


def _busy() -> BusyError:
    return BusyError("every replica is busy, and their queues are full; try again later")
