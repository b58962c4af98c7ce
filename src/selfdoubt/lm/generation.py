"""An answer while it grows: tokens come in one by one, and at the end there is an ``Answer``."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.conditions import Made, Origin
from selfdoubt.lm.decode import DecodeBatch, TokenEvent, TokenSequence, decode_batch
from selfdoubt.lm.hidden_states import AnswerStates, HiddenStatePooler
from selfdoubt.lm.prefill import ScoredId, prefill_in_chunks, run_to_end
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.text.detokenizer import TEXTS, Detokenizer, texts_in_pieces
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.lm.text.stops import StopFinder

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


#: The model's most probable answer to a single question.
OWN = Origin("greedy")


class AnswerInProgress:
    """One answer in the making.

    Args:
        lm: Whose answer it is.
        question: The tokens of the question's own words.
        stops: Texts that end the answer.
        state: The hidden states at the question's end, where they are wanted.
        before: Token ids that the answer's text goes on from; none where it stands by itself.
        origin: How the answer is made, as far as it is known before it ends.
    """

    def __init__(
        self,
        lm: RiskAwareLM,
        question: list[Token],
        stops: Sequence[str] = (),
        state: Float[Tensor, "layers width"] | None = None,
        before: Sequence[int] = (),
        origin: Origin = OWN,
    ) -> None:
        self.lm = lm
        self._origin = origin
        self.question = question
        self.tokens: list[Token] = []
        self.finish: Literal["stop", "length"] | None = None
        self._finder = StopFinder(stops)
        self._ahead: StopFinder | None = None  # has read the pending text, too
        self._pieces = Detokenizer(lm.tokenizer, before)
        self._held: deque[tuple[Token, Tensor | None]] = deque()  # not certain, or maybe the beginning of a stop
        self._released = 0  # characters
        self._ending: list[Token] = []  # what ended the answer and is no part of it
        self._asked = state
        self._first: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, event: TokenEvent) -> list[Token]:
        """Take the next step; returns the tokens that are certain now. After a stop text ``finish`` is set."""
        if self._first is None:
            self._first = event.states
        self.finish = event.finish
        cut = None
        if event.token is not None:
            late, own = self._pieces.push(event.token.id)
            cut = self._complete(late)
            self._held.append((self.lm._token(event.token, own), event.states))
            cut = self._finder.feed(own) if cut is None else cut
        elif event.end is not None:
            self._ending = [self.lm._token(event.end, "")]
            by_caller = None if event.end.id in self.lm.stop_ids else f"token {event.end.id}"
            self._origin = replace(self._origin, end_gap=event.end.gap, stop=by_caller)
        if cut is None and (self.finish is not None or self._stops_ahead()):
            cut = self._complete(self._pieces.rest())
        if cut is not None:
            self.finish = "stop"
            self._origin = replace(self._origin, end_gap=0.0, stop=self._finder.found)
        return self._release(cut)

    def _complete(self, late: list[str]) -> int | None:
        """Give text that is certain now to as many last tokens; returns where a stop begins."""
        if not any(late):
            return None
        self._ahead = None
        for place, text in enumerate(late, -len(late)):
            token, states = self._held[place]
            self._held[place] = (replace(token, text=token.text + text), states)
        return self._finder.feed("".join(late))

    def _stops_ahead(self) -> bool:
        """Return whether the pending text holds a stop as it is now: the answer then ends without a token more."""
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
        """Let go of the tokens that are certain; at a stop, of those before it, and cut the one that reaches beyond."""
        if cut is None and self.finish is None and self._pieces.pending:
            return []
        end = cut
        if end is None:
            end = self._finder.length - (self._finder.partial if self.finish is None else 0)
        found: list[Token] = []
        while self._held and not (cut is not None and self._released >= end):
            token, states = self._held[0]
            beyond = self._released + len(token.text) - end
            if beyond > 0:
                if cut is None:
                    break
                token = replace(token, text=token.text[:-beyond])
            self._held.popleft()
            found.append(token)
            self._released += len(token.text)
            if states is not None:
                self._sum = states if self._sum is None else self._sum + states
        if cut is not None:
            self._ending = [token for token, _ in self._held]
            self._held.clear()
        self.tokens += found
        return found

    @property
    def answer(self) -> Answer:
        """The answer, once it has ended."""
        assert self.finish is not None
        text = "".join(t.text for t in self.tokens)
        return self.lm.answer(
            self.tokens, self.question, self.finish, text, self._states(), self._ending, origin=self._origin
        )

    def _states(self) -> AnswerStates | None:
        if self._asked is None or self._first is None:
            return None
        mean = self._first if self._sum is None else self._sum / max(1, len(self.tokens))
        return AnswerStates(self.lm.layers, self._asked.cpu(), self._first.cpu(), mean.cpu())


class SequenceRequest(NamedTuple):
    """One answer that is wanted."""

    name: int  #: what the batch calls it
    prompt: Prompt
    sampling: Sampling
    seed: int
    stops: Sequence[str] = ()

    @property
    def origin(self) -> Origin:
        """How the answer will come about."""
        own = self.sampling
        made: Made = "sampled" if own.temperature > 0 else "greedy"
        return Origin(made, self.prompt.form, own.temperature, own.top_p)


def start_batch(
    lm: RiskAwareLM, wanted: Sequence[SequenceRequest], sizer: ChunkSizer | None = None
) -> Generator[None, None, tuple[list[AnswerInProgress], DecodeBatch]]:
    """Read prompts piece by piece; in the end there are answers in the making, and the batch that makes them.

    A prompt that comes several times is read once. ``sizer`` chooses the sizes of the pieces; None reads as much at
    once as memory for the logits allows.
    """
    different = {tuple(want.prompt.ids): want.prompt for want in wanted}
    place = {ids: row for row, ids in enumerate(different)}
    rows = [place[tuple(want.prompt.ids)] for want in wanted]
    stepper = HFStepper(lm.model, lm.layers, sizer)
    pool = (
        HiddenStatePooler([[find_last_user_token(p)] for p in different.values()], [len(i) for i in different])
        if lm.layers
        else None
    )
    scored, following = yield from prefill_in_chunks(stepper, [list(ids) for ids in different], pool=pool)
    questions = []
    for ids, prompt in zip(scored, different.values(), strict=True):
        questions.append((yield from build_question_in_chunks(lm, ids, prompt)))
    asked = [None] * len(different) if pool is None or pool.means is None else [means[0] for means in pool.means]
    answers = [
        AnswerInProgress(lm, questions[row], want.stops, asked[row], find_unscored_tokens(want.prompt), want.origin)
        for row, want in zip(rows, wanted, strict=True)
    ]
    if len(different) < len(wanted):
        stepper.keep(rows)
        following = following.of(rows)
    lines = [TokenSequence(w.name, w.sampling, w.seed, (stepper.context or 2**62) - len(w.prompt.ids)) for w in wanted]
    return answers, DecodeBatch(stepper, following, lines)


def generate_batch(
    lm: RiskAwareLM, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], stops: Sequence[str]
) -> tuple[list[AnswerInProgress], Iterator[list[Token]]]:
    """Read prompts; answers in the making, and the steps that make them, each with the tokens that it made certain."""
    wanted = [
        SequenceRequest(i, *each, stops) for i, each in enumerate(zip(prompts, repeat(sampling), seeds, strict=False))
    ]
    answers, batch = run_to_end(start_batch(lm, wanted))

    def steps() -> Iterator[list[Token]]:
        closed: set[int] = set()
        for event in decode_batch(batch, closed):
            yield answers[event.sequence].add(event)
            if answers[event.sequence].finish is not None:
                closed.add(event.sequence)

    return answers, steps()


def build_tokens_in_chunks(
    lm: RiskAwareLM, scored: Sequence[ScoredId | None], ids: Sequence[int], before: Sequence[int] = ()
) -> Generator[None, None, list[Token]]:
    """Give scored ids their text, some hundreds at a time.

    Args:
        lm: Whose they are.
        scored: The scores of each id.
        ids: Of a text.
        before: Ids that it goes on from, see ``Detokenizer``.

    Yields:
        Nothing, after each piece.

    Returns:
        The tokens, without those that nothing predicted.
    """
    texts = yield from texts_in_pieces(lm.tokenizer, ids, before)
    found: list[Token] = []
    for token, text in zip(scored, texts, strict=True):
        if token is not None:
            found.append(lm._token(token, text))
            if not len(found) % TEXTS:
                yield
    return found


def build_question_in_chunks(
    lm: RiskAwareLM, scored: Sequence[ScoredId | None], prompt: Prompt
) -> Generator[None, None, list[Token]]:
    """Give the scored ids of a prompt their text, those of the question's own words; as ``build_tokens_in_chunks``."""
    places = [i for i, own in enumerate(prompt.own) if own]
    return build_tokens_in_chunks(lm, [scored[i] for i in places], [prompt.ids[i] for i in places])


def find_last_user_token(prompt: Prompt) -> tuple[int, int]:
    """The place of the question's last own token, or of the prompt's last."""
    last = max((i for i, own in enumerate(prompt.own) if own), default=len(prompt.ids) - 1)
    return last, last + 1


def find_unscored_tokens(prompt: Prompt) -> list[int]:
    """Return the ids whose text an answer goes on from.

    There are none after a chat template or a control token: what parts the answer from those is not the answer's.
    """
    return prompt.ids if prompt.own[-1:] == [True] else []


class Stream(Iterator[Token]):
    """Tokens as they are chosen. ``question`` is there from the start, ``answer`` when the tokens have ended."""

    def __init__(
        self, lm: RiskAwareLM, prompt: Prompt, sampling: Sampling, seed: int, stops: Sequence[str] = ()
    ) -> None:
        (self._sequence,), self._steps = generate_batch(lm, [prompt], sampling, [seed], stops)
        self._ready: deque[Token] = deque()

    @property
    def question(self) -> list[Token]:
        """The tokens of the question's own words."""
        return self._sequence.question

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            ConfigError: If the tokens have not ended yet.
        """
        if self._sequence.finish is None or self._ready:
            raise ConfigError("the answer is not finished; read the stream to its end first")
        return self._sequence.answer

    def __next__(self) -> Token:
        while not self._ready:
            self._ready.extend(next(self._steps))
        return self._ready.popleft()
