"""What the engine's thread works on: prompts that are being read, and the batch of sequences that are decoded.

The answers in ``_choices`` are the truth: whatever is in the batch and not among them leaves it before the next token.
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
from selfdoubt.lm.decode import DecodeBatch, TokenEvent, TokenSequence
from selfdoubt.lm.generation import AnswerInProgress, SequenceRequest, start_batch
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.prefill import prefill, prefill_in_chunks
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.prefills import Pieces, Readings
from selfdoubt.serve.engine.queue import Waiting
from selfdoubt.serve.engine.request import Began, Ended, Grew, Job
from selfdoubt.serve.engine.stats import Meter

#: Seconds from one token of a stream to the next that prompts and texts to score may cause, a step included.
GAP = 0.22
#: Seconds of a piece while no stream runs.
ALONE = 0.5


@dataclass(eq=False)
class _Choice:
    """One answer on its way; there is no progress before its prompt was read."""

    job: Job
    number: int
    progress: AnswerInProgress | None = None


class InFlight:
    """Requests that were let in. But for ``size`` and ``pace``, it is for the engine's thread alone."""

    def __init__(
        self, lm: RiskAwareLM, limits: Limits, meter: Meter, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.pace = 1.0  #: seconds between two requests that end, lately
        self.misfortunes = 0  #: requests in a row that failed in the model
        self._lm, self._limits, self._meter = lm, limits, meter
        self._choices: dict[int, _Choice] = {}
        self._readings = Readings()
        self._sizer = ChunkSizer()
        self._clock = clock
        self._step_took = 0.0  # seconds
        self._members = 1
        self._batch: DecodeBatch | None = None
        self._parked: deque[DecodeBatch] = deque()  # sequences that cannot join the batch, because no cache can
        self._joins = True
        self._failed_steps = 0
        self._chosen_at: float | None = None  # when the batch last got tokens; None while there is none
        self._names = itertools.count()
        self._last_end = time.monotonic()

    @property
    def size(self) -> int:
        """Answers on their way."""
        return len(self._choices)

    def rehearse(self) -> None:
        """Take a few steps with nobody's prompt, and find out whether this model's batches can be joined."""
        self.misfortunes = 0

        def one(name: int) -> DecodeBatch:
            stepper = HFStepper(self._lm.model, self._lm.front.layers)
            _, following = prefill(stepper, [[1] * (2 + name)])
            self._members = stepper.members
            return DecodeBatch(stepper, following, [TokenSequence(name, Sampling(max_tokens=2), 0, 2)])

        batch = one(0)
        try:
            batch.join(one(1))
        except WrapError:
            self._joins, batch = False, one(0)
        batch.choose()
        batch.step()
        for length in (2, min(32, (self._lm.front.context or 64) // 2)):
            pieces = prefill_in_chunks(HFStepper(self._lm.model, self._lm.front.layers, self._sizer), [[1] * length])
            for _ in range(length):
                with self.piece():
                    next(pieces, None)

    @property
    def is_reading(self) -> bool:
        """Whether a prompt is not read to its end."""
        return bool(self._readings)

    @contextmanager
    def piece(self) -> Iterator[ChunkSizer]:
        """Measure one piece of a prompt, or of a text to score, that is read within."""
        self._sizer.begin(ALONE if self._batch is None else max(GAP - self._step_took, GAP / 4))
        began = self._clock()
        yield self._sizer
        self._sizer.learn(self._clock() - began)

    @staticmethod
    def is_over(job: Job) -> bool:
        """Whether nobody waits for this any more, or not in time."""
        return job.cancelled or time.monotonic() > job.deadline

    def admit(self, waiting: Waiting) -> list[Job]:
        """Let in as many as there is room for, and as are read well side by side; the rest keeps its order."""
        if self._readings.is_full or (self._choices and not self._joins):
            return []
        found: list[Job] = []
        # Beside a stream, no more prompts at once than leave each piece some columns of each.
        most = float("inf") if self._batch is None else max(1, self._sizer.tokens(0) // (4 * self._members))
        while (
            len(found) < most and (job := waiting.next(self._readings.has_place)) is not None and self._fits(found, job)
        ):
            found.append(waiting.take(job))
        for job in found:
            for number in range(len(job.ask.seeds)):
                self._choices[next(self._names)] = _Choice(job, number)
        return found

    def _fits(self, others: Sequence[Job], job: Job) -> bool:
        lengths = [len(other.ask.prompt.ids) for other in (*others, job)]
        if max(lengths) > 2 * min(lengths) + 32:  # beside a long prompt, a short one is mostly padding
            return False
        answers = self.size + sum(len(other.ask.seeds) for other in (*others, job))
        running = (choice.job for choice in self._choices.values())
        longest = max(other.ask.length(self._lm.front.context) for other in (*running, *others, job))
        return answers <= self._limits.batch and answers * longest <= self._limits.batch_tokens

    def work(self, newcomers: list[Job], *, reads: bool = True) -> None:
        """Read one piece of prompts, unless ``reads`` is False, and choose one token for every sequence."""
        if newcomers:
            self._readings.add(newcomers)
        for job in {choice.job for choice in self._choices.values() if self.is_over(choice.job)}:
            self.end(job)
        if reads:
            self._read()
        if self._batch is None and self._parked:
            self._batch = self._parked.popleft()
        if self._batch is not None:
            began = self._clock()
            self._advance(self._batch)
            self._step_took = self._clock() - began
            if not (self._batch and self._batch.sequences):
                self._batch = self._chosen_at = None

    def end(self, job: Job, error: BaseException | None = None) -> None:
        """End a request because of an error, its deadline, or because nobody waits for it; its rows are freed."""
        if error is None and not job.cancelled:
            error = DeadlineError(
                f"the answer was not finished within {job.ask.timeout:g} seconds; ask for a shorter one, or try later"
            )
        outcome = "cancelled" if error is None else "deadline" if isinstance(error, DeadlineError) else "error"
        if error is not None and not isinstance(error, SelfdoubtError):
            self.misfortunes += 1
        unfinished = [name for name, choice in self._choices.items() if choice.job is job]
        for name in unfinished:
            del self._choices[name]
        for _ in unfinished or (None,):
            self._meter.ended(outcome, None)  # type: ignore[arg-type]
        self._finish(job, error)

    def end_all(self, error: BaseException) -> None:
        """End everything."""
        for job in {choice.job for choice in self._choices.values()}:
            self.end(job, error)
        self._batch = None
        self._readings.clear()
        self._parked.clear()

    def _finish(self, job: Job, error: BaseException | None = None) -> None:
        now = time.monotonic()
        self.pace += 0.1 * (now - self._last_end - self.pace)
        self._last_end = now
        job.end(error)

    def _read(self) -> None:
        """One piece of the prompts of one group."""
        running = {choice.job for choice in self._choices.values()}
        group = self._readings.next(self._begin, running.__contains__)
        if group is None:
            return
        try:
            with self.piece():
                opened = group.advance()
        except Exception as error:
            if len(group.jobs) == 1:
                self.end(group.jobs[0], error)
            else:  # one of them it was: apart, the others do not suffer for it
                self._readings.add_apart(group.jobs)
            return
        if opened is None:
            self._readings.put_back(group)
        else:
            self._welcome(*opened)

    def _begin(self, jobs: Sequence[Job]) -> Pieces | None:
        wanted = [
            SequenceRequest(name, c.job.ask.prompt, c.job.ask.sampling, c.job.ask.seeds[c.number], c.job.ask.stops)
            for name, c in self._choices.items()
            if c.job in jobs
        ]
        return start_batch(self._lm, wanted, self._sizer) if wanted else None

    def _welcome(self, answers: list[AnswerInProgress], batch: DecodeBatch) -> None:
        """Prompts were read: tell so, and let their sequences join the batch."""
        begun: set[Job] = set()
        for line, progress in zip(batch.sequences, answers, strict=True):
            choice = self._choices.get(line.name)
            if choice is None:
                continue
            choice.progress = progress
            if choice.job not in begun:
                choice.job.put(Began(progress.question))
                begun.add(choice.job)
        batch.drop({line.name for line in batch.sequences} - self._choices.keys())
        if batch.sequences:
            self._take_in(batch)

    def _take_in(self, batch: DecodeBatch) -> None:
        if self._batch is None:
            self._batch = batch
        elif not self._joins:
            self._parked.append(batch)
        else:
            lines = [*self._batch.sequences, *batch.sequences]
            try:
                self._batch.join(batch)
            except Exception as error:
                self._start_over(lines, error)

    def _advance(self, batch: DecodeBatch) -> None:
        """One token for every sequence."""
        batch.drop({line.name for line in batch.sequences} - self._choices.keys())
        size = len(batch.sequences)
        if not size:
            return
        try:
            events = batch.choose()
        except NonFiniteError as error:
            broken = batch.find_non_finite()
            if not broken:
                self._start_over(batch.sequences, error)
            for job in {self._choices[name].job for name in broken}:
                self.end(job, error)
            return
        except Exception as error:
            self._start_over(batch.sequences, error)
            return
        now = time.monotonic()
        self._meter.stepped(size, None if self._chosen_at is None else now - self._chosen_at)
        self._chosen_at = now
        for event in events:
            self._tell(event)
        try:
            batch.step({line.name for line in batch.sequences} - self._choices.keys())
        except Exception as error:
            self._start_over(batch.sequences, error)
            return
        self._failed_steps = 0

    def _tell(self, event: TokenEvent) -> None:
        choice = self._choices.get(event.sequence)
        if choice is None or choice.progress is None:
            return  # another answer of the same request has just failed
        job, progress = choice.job, choice.progress
        try:
            is_first = not progress.tokens
            tokens = progress.add(event)
            answer = None if progress.finish is None else progress.answer
        except Exception as error:
            self.end(job, error)
            return
        if tokens:
            job.put(Grew(choice.number, tokens))
            self._meter.grew(len(tokens))
            if is_first:
                self._meter.first_token(time.monotonic() - job.born)
        if answer is not None:
            self.misfortunes = 0
            del self._choices[event.sequence]
            job.put(Ended(choice.number, answer))
            self._meter.ended("length" if answer.finish == "length" else "stop", answer)
            if not any(other.job is job for other in self._choices.values()):
                self._finish(job)

    def _start_over(self, lines: Sequence[TokenSequence], error: Exception) -> None:
        """A step failed and left the cache in an unknown state: read each sequence again, by itself.

        Whoever fails again was the cause. If the next step fails too, nobody can be told apart, and all end.
        """
        self._batch = None
        self._failed_steps += 1
        error.__traceback__ = None  # it holds the failed step's tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for line in lines:
            choice = self._choices.get(line.name)
            if choice is None:
                continue
            if self._failed_steps > 1:
                self.end(choice.job, error)
                continue
            try:
                stepper = HFStepper(self._lm.model, self._lm.front.layers)
                _, following = prefill(stepper, [[*choice.job.ask.prompt.ids, *line.chosen]])
            except Exception as own:
                self.end(choice.job, own)
            else:
                self._take_in(DecodeBatch(stepper, following, [line]))
