"""Generates answers: requests are prefilled and decoded in batches, and tokens become ``Answer``s as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.conditions import Made, Origin
from selfdoubt.lm.decode import SequenceBatch, TokenEvent, TokenSequence, decode_batch
from selfdoubt.lm.decoding import start_decoding
from selfdoubt.lm.front import LMFront, ModelWithFront
from selfdoubt.lm.hidden_states import AnswerStates, HiddenStatePooler
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.options import Options, list_stop_texts, read_number, read_sampling
from selfdoubt.lm.prefill import prefill_in_chunks, run_to_end
from selfdoubt.lm.probes import build_stepper
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.scores import compute_answer_scores
from selfdoubt.lm.text.detokenizer import Detokenizer
from selfdoubt.lm.text.prompt import Prompt, encode
from selfdoubt.lm.text.stops import StopFinder

#: Of the model's most probable answer to a single question.
GREEDY = Origin("greedy")


class _Held(NamedTuple):
    """A token that is not released, with what its step gave."""

    token: Token
    states: Float[Tensor, "layers width"] | None
    attention: Float[Tensor, "attended heads"] | None


class AnswerInProgress:
    """An answer whose tokens are being chosen.

    Args:
        front: Front of the model that answers.
        question: The user's tokens of the question.
        stops: Texts that end the answer.
        state: Hidden states at the question's end; None if no layers are asked for.
        before: Token ids that the answer's text continues; empty if it stands by itself.
        origin: Origin of the answer, as far as it is known before its end.
        first: Hidden states in which the first token is chosen; None if no layers are asked for.
    """

    def __init__(
        self,
        front: LMFront,
        question: list[Token],
        stops: Sequence[str] = (),
        state: Float[Tensor, "layers width"] | None = None,
        before: Sequence[int] = (),
        origin: Origin = GREEDY,
        first: Float[Tensor, "layers width"] | None = None,
    ) -> None:
        self._front = front
        self._origin = origin
        self.question = question
        self.tokens: list[Token] = []
        self.finish: Literal["stop", "length"] | None = None
        self._finder = StopFinder(stops)
        self._ahead: StopFinder | None = None  # has read the pending text, too
        self._pieces = Detokenizer(front.tokenizer, before)
        self._held: deque[_Held] = deque()  # not certain, or maybe the beginning of a stop
        self._released = 0  # characters
        self._ending: list[_Held] = []  # ended the answer, and is not part of it
        self._attention: list[Tensor | None] = []  # of the tokens
        self._question_state = state
        self._first = first
        self._sum: Tensor | None = None
        #: Probability, from the question alone, that the model's own answer is right; None if it is not known.
        self.p_answerable = front.scorer.estimate_answerable(
            compute_answer_scores([], question, members_read=front.members_read), self._states(), origin
        )

    def add(self, event: TokenEvent) -> list[Token]:
        """Add the next event; return the tokens that are certain now. After a stop text ``finish`` is set."""
        self.finish = event.finish
        cut = None
        if event.token is not None:
            late, text = self._pieces.push(event.token.id)
            cut = self._complete(late)
            self._held.append(_Held(self._front.tokens.build(event.token, text), event.states, event.attention))
            cut = self._finder.feed(text) if cut is None else cut
        elif event.end is not None:
            self._ending = [_Held(self._front.tokens.build(event.end, ""), event.states, event.attention)]
            by_caller = None if event.end.id in self._front.stop_ids else f"token {event.end.id}"
            self._origin = replace(self._origin, end_gap=event.end.gap, stop=by_caller)
        if cut is None and (self.finish is not None or self._stops_ahead()):
            cut = self._complete(self._pieces.rest())
        if cut is not None:
            self.finish = "stop"
            self._origin = replace(self._origin, end_gap=0.0, stop=self._finder.stop)
        return self._release(cut)

    def _complete(self, late: list[str]) -> int | None:
        """Give the last tokens their text that is certain now; return where a stop begins."""
        if not any(late):
            return None
        self._ahead = None
        for place, text in enumerate(late, -len(late)):
            held = self._held[place]
            self._held[place] = held._replace(token=replace(held.token, text=held.token.text + text))
        return self._finder.feed("".join(late))

    def _stops_ahead(self) -> bool:
        """Return whether the pending text already holds a stop: the answer then ends without a further token."""
        if not self._pieces.pending:
            self._ahead = None
            return False
        if not self._pieces.ahead:
            return False
        if self._ahead is None:
            self._ahead = self._finder.fork()
        return self._ahead.feed(self._pieces.ahead) is not None and (
            self._finder.fork().feed(self._pieces.flush()) is not None
        )

    def _release(self, cut: int | None) -> list[Token]:
        """Release the tokens that are certain; at a stop, those before it, the last one cut where the stop begins."""
        if cut is None and self.finish is None and self._pieces.pending:
            return []
        partial = self._finder.partial if self.finish is None else 0  # maybe the beginning of a stop
        end = self._finder.length - partial if cut is None else cut
        released: list[Token] = []
        # Where a stop begins, or may, a token without text is held too: its bytes may be the stop's first character.
        while self._held and (self._released < end or (cut is None and not partial)):
            token, states, attention = self._held[0]
            beyond = self._released + len(token.text) - end
            if beyond > 0:
                if cut is None:
                    break
                token = replace(token, text=token.text[:-beyond])
            self._held.popleft()
            released.append(token)
            self._attention.append(attention)
            self._released += len(token.text)
            if states is not None:
                self._sum = states if self._sum is None else self._sum + states
        if cut is not None:
            self._ending = list(self._held)
            self._held.clear()
        self.tokens += released
        return released

    @property
    def answer(self) -> Answer:
        """The answer, once it has ended."""
        assert self.finish is not None
        text = "".join(t.text for t in self.tokens)
        ending = [held.token for held in self._ending]
        each = self._attention if self.tokens else [held.attention for held in self._ending]
        known = [attention for attention in each if attention is not None]
        attention = torch.stack(known).cpu().numpy() if known and len(known) == len(each) else None
        return self._front.scorer.score(
            self.tokens, self.question, self.finish, text, self._states(), ending,
            origin=self._origin, attention=attention,
        )  # fmt: skip

    def _states(self) -> AnswerStates | None:
        if self._question_state is None or self._first is None:
            return None
        mean = self._first if self._sum is None else self._sum / max(1, len(self.tokens))
        return AnswerStates(self._front.layers, self._question_state.cpu(), self._first.cpu(), mean.cpu())


@dataclass(frozen=True)
class SequenceRequest:
    """A request for one answer: its prompt, the settings of decoding, its seed and stop texts."""

    name: int  #: number of the sequence in its batch
    prompt: Prompt
    sampling: Sampling
    seed: int
    stops: Sequence[str] = ()  #: texts that end the answer

    @property
    def origin(self) -> Origin:
        """The origin of the answer, as far as it is known before it ends."""
        made: Made = "sampled" if self.sampling.temperature > 0 else "greedy"
        return Origin(made, self.prompt.form, self.sampling.temperature, self.sampling.top_p)


def build_requests(
    front: LMFront, prompts: Sequence[PromptLike], options: Options, seeds: Sequence[int]
) -> list[SequenceRequest]:
    """Build the requests of prompts that share their options.

    Raises:
        PromptError: If a prompt is empty.
        ConfigError: If an option is out of range.
    """
    sampling, stops = read_sampling(options, front.stop_ids), list_stop_texts(options)
    encoded = [encode(front.tokenizer, prompt, raw=options.get("raw", False)) for prompt in prompts]
    pairs = zip(encoded, seeds, strict=True)
    return [SequenceRequest(i, prompt, sampling, seed, stops) for i, (prompt, seed) in enumerate(pairs)]


def generate_answers(
    lm: ModelWithFront, prompts: Sequence[PromptLike], batch_size: int, seeds: Sequence[int], options: Options
) -> list[Answer]:
    """Answer prompts, ``batch_size`` at a time; one seed per prompt.

    Raises:
        PromptError: If a prompt is empty or too long.
        ConfigError: If an option is out of range.
    """
    if read_number("batch_size", batch_size, whole=True) < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    requests = build_requests(lm.front, prompts, options, seeds)
    answers: list[Answer] = []
    for first in range(0, len(requests), batch_size):
        batch, steps = generate_batch(lm, requests[first : first + batch_size])
        deque(steps, maxlen=0)
        answers += [progress.answer for progress in batch]
    return answers


def start_batch(
    lm: ModelWithFront, requests: Sequence[SequenceRequest], sizer: ChunkSizer | None = None
) -> Generator[None, None, tuple[list[AnswerInProgress], SequenceBatch]]:
    """Prefill the prompts in chunks; in the end there are answers in progress, and the batch that decodes them.

    A prompt that comes several times is read once. ``sizer`` chooses the sizes of the pieces; None reads as much at
    once as memory for the logits allows.
    """
    front = lm.front
    prompts = {tuple(request.prompt.ids): request.prompt for request in requests}
    place = {ids: row for row, ids in enumerate(prompts)}
    rows = [place[tuple(request.prompt.ids)] for request in requests]
    stepper = build_stepper(lm, sizer)
    pool = (
        HiddenStatePooler([[find_last_user_token(p)] for p in prompts.values()], [len(i) for i in prompts])
        if front.layers
        else None
    )
    scored, next_logits = yield from prefill_in_chunks(stepper, [list(ids) for ids in prompts], pool=pool)
    questions = []
    for ids, prompt in zip(scored, prompts.values(), strict=True):
        questions.append((yield from front.tokens.build_question_in_chunks(ids, prompt)))
    states = [None] * len(prompts) if pool is None or pool.means is None else [means[0] for means in pool.means]
    if len(prompts) < len(requests):
        stepper.keep(rows)
        next_logits = next_logits.select(rows)
    firsts = [None] * len(rows) if next_logits.states is None else list(next_logits.states[0])
    answers = [
        AnswerInProgress(
            front,
            questions[row],
            request.stops,
            states[row],
            find_unscored_tokens(request.prompt),
            request.origin,
            first,
        )
        for row, request, first in zip(rows, requests, firsts, strict=True)
    ]
    room = stepper.context or 2**62
    sequences = [TokenSequence(r.name, r.sampling, r.seed, room - len(r.prompt.ids)) for r in requests]
    return answers, start_decoding(lm, stepper, next_logits, sequences)


def generate_batch(
    lm: ModelWithFront, requests: Sequence[SequenceRequest]
) -> tuple[list[AnswerInProgress], Iterator[list[Token]]]:
    """Prefill the prompts; return the answers in progress, and an iterator that decodes them step by step.

    Each step gives the tokens that it made certain.
    """
    answers, batch = run_to_end(start_batch(lm, requests))
    by_name = {request.name: answer for request, answer in zip(requests, answers, strict=True)}

    def steps() -> Iterator[list[Token]]:
        closed: set[int] = set()
        for event in decode_batch(batch, closed):
            answer = by_name[event.sequence]
            yield answer.add(event)
            if answer.finish is not None:
                closed.add(event.sequence)

    return answers, steps()


def find_last_user_token(prompt: Prompt) -> tuple[int, int]:
    """Return the span ``(index, index + 1)`` of the last user token, or of the prompt's last token without any."""
    last = max((i for i, is_user in enumerate(prompt.is_user_token) if is_user), default=len(prompt.ids) - 1)
    return last, last + 1


def find_unscored_tokens(prompt: Prompt) -> list[int]:
    """Return the ids of the prompt whose text the answer continues.

    There are none after a chat template or a control token: white space after those does not belong to the answer.
    """
    return prompt.ids if prompt.is_user_token[-1:] == [True] else []


class Stream(Iterator[Token]):
    """An iterator of tokens as they are chosen; ``question`` is set from the start, ``answer`` after the last token."""

    def __init__(self, lm: ModelWithFront, request: SequenceRequest) -> None:
        (self._progress,), self._steps = generate_batch(lm, [request])
        self._ready: deque[Token] = deque()

    @property
    def question(self) -> list[Token]:
        """The user's tokens of the question."""
        return self._progress.question

    @property
    def p_answerable(self) -> float | None:
        """Probability, from the question alone, that the model's own answer is right; known before the first token.

        None without a calibration of it, or where it does not hold.
        """
        return self._progress.p_answerable

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            ConfigError: If the tokens have not ended yet.
        """
        if self._progress.finish is None or self._ready:
            raise ConfigError("the answer is not finished; read the stream to its end first")
        return self._progress.answer

    def __next__(self) -> Token:
        while not self._ready:
            self._ready.extend(next(self._steps))
        return self._ready.popleft()
