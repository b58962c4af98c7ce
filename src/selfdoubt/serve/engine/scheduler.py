"""The scheduler of the engine's thread: prefills, and the batch of sequences that are decoded.

``_answers`` decides which sequences go on: one that is not among them leaves the batch before the next token.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from selfdoubt.errors import DeadlineError, NonFiniteError, SelfdoubtError, WrapError
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.decode import SequenceBatch, TokenEvent, TokenSequence
from selfdoubt.lm.decoding import start_decoding
from selfdoubt.lm.generation import AnswerInProgress, SequenceRequest, start_batch
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.prefill import prefill, prefill_in_chunks
from selfdoubt.lm.probes import build_stepper
from selfdoubt.lm.sampling import Sampling
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.prefills import PrefillChunks, PrefillQueue
from selfdoubt.serve.engine.queue import FairQueue
from selfdoubt.serve.engine.request import Finished, RequestHandle, Started, TokensAdded
from selfdoubt.serve.engine.stats import EngineStats

#: Seconds from one token of a stream to the next that prompts and texts to score may cause, a step included.
STREAM_GAP = 0.22
#: Seconds of a chunk while no stream runs.
IDLE_CHUNK = 0.5


@dataclass(eq=False)
class _RunningAnswer:
    """One answer of a request; its progress is None before its prompt was read."""

    handle: RequestHandle
    choice: int
    progress: AnswerInProgress | None = None


class Scheduler:
    """Requests that were admitted. Except ``size`` and ``seconds_per_request``, it is for the engine's thread alone."""

    def __init__(
        self, lm: RiskAwareLM, limits: Limits, stats: EngineStats, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds_per_request = 1.0  #: time between two requests that end, lately
        self.consecutive_failures = 0  #: requests in a row that failed in the model
        self._lm, self._limits, self._stats = lm, limits, stats
        self._answers: dict[int, _RunningAnswer] = {}
        self._prefills = PrefillQueue()
        self._sizer = ChunkSizer()
        self._clock = clock
        self._step_took = 0.0  # seconds
        self._members = 1
        self._batch: SequenceBatch | None = None
        self._parked: deque[SequenceBatch] = deque()  # sequences that cannot join the batch, because no cache can
        self._joins = True
        self._failed_steps = 0
        self._chosen_at: float | None = None  # when the batch last got tokens; None while there is none
        self._names = itertools.count()
        self._last_end = time.monotonic()

    @property
    def size(self) -> int:
        """Number of answers in progress."""
        return len(self._answers)

    def warm_up(self) -> None:
        """Take a few steps with made-up prompts, and find out whether this model's batches can be joined."""
        self.consecutive_failures = 0

        def start_one(name: int) -> SequenceBatch:
            stepper = build_stepper(self._lm)
            _, following = prefill(stepper, [[1] * (2 + name)])
            self._members = stepper.members
            return start_decoding(self._lm, stepper, following, [TokenSequence(name, Sampling(max_tokens=2), 0, 2)])

        batch = start_one(0)
        try:
            batch.join(start_one(1))
        except WrapError:
            self._joins, batch = False, start_one(0)
        batch.choose()
        batch.step()
        batch.drop({sequence.name for sequence in batch.sequences})
        for length in (2, min(32, (self._lm.front.context or 64) // 2)):
            chunks = prefill_in_chunks(build_stepper(self._lm, self._sizer), [[1] * length])
            for _ in range(length):
                with self.timed_chunk():
                    next(chunks, None)

    @property
    def is_prefilling(self) -> bool:
        """True if a prompt is not read to its end."""
        return bool(self._prefills)

    @contextmanager
    def timed_chunk(self) -> Iterator[ChunkSizer]:
        """Measure one chunk of a prompt, or of a text to score, that is read within the block."""
        self._sizer.begin(IDLE_CHUNK if self._batch is None else max(STREAM_GAP - self._step_took, STREAM_GAP / 4))
        began = self._clock()
        yield self._sizer
        self._sizer.learn(self._clock() - began)

    @staticmethod
    def is_over(handle: RequestHandle) -> bool:
        """Return whether a request was cancelled, or its time is over."""
        return handle.cancelled or time.monotonic() > handle.deadline

    def admit(self, queue: FairQueue) -> list[RequestHandle]:
        """Admit requests that there is room for and whose prompts can share a batch; the others keep their order."""
        if self._prefills.is_full or (self._answers and not self._joins):
            return []
        admitted: list[RequestHandle] = []
        # Next to a stream, no more prompts at once than leave each chunk some columns of each.
        most = float("inf") if self._batch is None else max(1, self._sizer.tokens(0) // (4 * self._members))
        while (
            len(admitted) < most
            and (handle := queue.next(self._prefills.has_place)) is not None
            and self._fits(admitted, handle)
        ):
            admitted.append(queue.take(handle))
        for handle in admitted:
            for choice in range(len(handle.request.seeds)):
                self._answers[next(self._names)] = _RunningAnswer(handle, choice)
        return admitted

    def _fits(self, others: Sequence[RequestHandle], handle: RequestHandle) -> bool:
        lengths = [len(other.request.prompt.ids) for other in (*others, handle)]
        if max(lengths) > 2 * min(lengths) + 32:  # next to a long prompt, a short one is mostly padding
            return False
        answers = self.size + sum(len(other.request.seeds) for other in (*others, handle))
        running = (answer.handle for answer in self._answers.values())
        longest = max(other.request.max_length(self._lm.front.context) for other in (*running, *others, handle))
        return answers <= self._limits.batch and answers * longest <= self._limits.batch_tokens

    def work(self, newcomers: list[RequestHandle], *, prefills: bool = True) -> None:
        """Read one chunk of prompts, unless ``prefills`` is False, and choose one token for every sequence."""
        if newcomers:
            self._prefills.add(newcomers)
        for handle in {answer.handle for answer in self._answers.values() if self.is_over(answer.handle)}:
            self.end_request(handle)
        if prefills:
            self._advance_prefill()
        if self._batch is None and self._parked:
            self._batch = self._parked.popleft()
        if self._batch is not None:
            began = self._clock()
            self._step(self._batch)
            self._step_took = self._clock() - began
            if not (self._batch and self._batch.sequences):
                self._batch = self._chosen_at = None

    def end_request(self, handle: RequestHandle, error: BaseException | None = None) -> None:
        """End a request because of an error, its deadline, or because it was cancelled; its rows are freed."""
        if error is None and not handle.cancelled:
            error = DeadlineError(
                f"the answer was not finished within {handle.request.timeout:g} seconds; ask for a shorter one, or "
                "try later"
            )
        outcome = "cancelled" if error is None else "deadline" if isinstance(error, DeadlineError) else "error"
        if error is not None and not isinstance(error, SelfdoubtError):
            self.consecutive_failures += 1
        unfinished = [name for name, answer in self._answers.items() if answer.handle is handle]
        for name in unfinished:
            del self._answers[name]
        for _ in unfinished or (None,):
            self._stats.record_end(outcome, None)  # type: ignore[arg-type]
        self._finish(handle, error)

    def end_all(self, error: BaseException) -> None:
        """End all requests."""
        for handle in {answer.handle for answer in self._answers.values()}:
            self.end_request(handle, error)
        self._batch = None
        self._prefills.clear()
        self._parked.clear()

    def _finish(self, handle: RequestHandle, error: BaseException | None = None) -> None:
        now = time.monotonic()
        self.seconds_per_request += 0.1 * (now - self._last_end - self.seconds_per_request)
        self._last_end = now
        handle.finish(error)

    def _advance_prefill(self) -> None:
        """Read one chunk of the prompts of one group."""
        running = {answer.handle for answer in self._answers.values()}
        group = self._prefills.next(self._begin_prefill, running.__contains__)
        if group is None:
            return
        try:
            with self.timed_chunk():
                prefilled = group.advance()
        except Exception as error:
            if len(group.handles) == 1:
                self.end_request(group.handles[0], error)
            else:  # one of them caused it: apart, the others do not suffer for it
                self._prefills.add_apart(group.handles)
            return
        if prefilled is None:
            self._prefills.put_back(group)
        else:
            self._start_answers(*prefilled)

    def _begin_prefill(self, handles: Sequence[RequestHandle]) -> PrefillChunks | None:
        requests = [
            SequenceRequest(name, request.prompt, request.sampling, request.seeds[answer.choice], request.stops)
            for name, answer in self._answers.items()
            if answer.handle in handles
            for request in [answer.handle.request]
        ]
        return start_batch(self._lm, requests, self._sizer) if requests else None

    def _start_answers(self, answers: list[AnswerInProgress], batch: SequenceBatch) -> None:
        """Publish that prompts were read, and let their sequences join the batch."""
        started: set[RequestHandle] = set()
        for sequence, progress in zip(batch.sequences, answers, strict=True):
            answer = self._answers.get(sequence.name)
            if answer is None:
                continue
            answer.progress = progress
            if answer.handle not in started:
                answer.handle.publish(Started(progress.question, progress.p_answerable))
                started.add(answer.handle)
        batch.drop({sequence.name for sequence in batch.sequences} - self._answers.keys())
        if batch.sequences:
            self._join(batch)

    def _join(self, batch: SequenceBatch) -> None:
        if self._batch is None:
            self._batch = batch
        elif not self._joins:
            self._parked.append(batch)
        else:
            sequences = [*self._batch.sequences, *batch.sequences]
            try:
                self._batch.join(batch)
            except Exception as error:
                self._restart(sequences, error)

    def _step(self, batch: SequenceBatch) -> None:
        """Choose one token for every sequence."""
        batch.drop({sequence.name for sequence in batch.sequences} - self._answers.keys())
        size = len(batch.sequences)
        if not size:
            return
        try:
            events = batch.choose()
        except NonFiniteError as error:
            broken = batch.find_non_finite()
            if not broken:
                self._restart(batch.sequences, error)
            for handle in {self._answers[name].handle for name in broken}:
                self.end_request(handle, error)
            return
        except Exception as error:
            self._restart(batch.sequences, error)
            return
        now = time.monotonic()
        self._stats.record_step(size, None if self._chosen_at is None else now - self._chosen_at)
        self._chosen_at = now
        for event in events:
            self._publish(event)
        try:
            batch.step({sequence.name for sequence in batch.sequences} - self._answers.keys())
        except Exception as error:
            self._restart(batch.sequences, error)
            return
        self._failed_steps = 0

    def _publish(self, event: TokenEvent) -> None:
        """Send what a step made certain to its reader."""
        running = self._answers.get(event.sequence)
        if running is None or running.progress is None:
            return  # another answer of the same request has just failed
        handle, progress = running.handle, running.progress
        try:
            is_first = not progress.tokens
            tokens = progress.add(event)
            answer = None if progress.finish is None else progress.answer
        except Exception as error:
            self.end_request(handle, error)
            return
        if tokens:
            handle.publish(TokensAdded(running.choice, tokens))
            self._stats.record_tokens(len(tokens))
            if is_first:
                self._stats.record_first_token(time.monotonic() - handle.arrived_at)
        if answer is not None:
            self.consecutive_failures = 0
            del self._answers[event.sequence]
            handle.publish(Finished(running.choice, answer))
            self._stats.record_end("length" if answer.finish == "length" else "stop", answer)
            if not any(other.handle is handle for other in self._answers.values()):
                self._finish(handle)

    def _restart(self, sequences: Sequence[TokenSequence], error: Exception) -> None:
        """Prefill each sequence again by itself, after a step that failed and left the cache in an unknown state.

        A sequence that fails again was the cause. If the next step fails too, the cause cannot be found, and all end.
        """
        self._batch = None
        self._failed_steps += 1
        error.__traceback__ = None  # it holds the failed step's tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for sequence in sequences:
            answer = self._answers.get(sequence.name)
            if answer is None:
                continue
            if self._failed_steps > 1:
                self.end_request(answer.handle, error)
                continue
            try:
                stepper = build_stepper(self._lm)
                _, following = prefill(stepper, [[*answer.handle.request.prompt.ids, *sequence.chosen]])
            except Exception as failure:
                self.end_request(answer.handle, failure)
            else:
                self._join(start_decoding(self._lm, stepper, following, [sequence]))
