"""A language model that knows what it doesn't know: generate, stream and score text with a risk for every token."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from selfdoubt import storage
from selfdoubt.errors import ConfigError, PromptError
from selfdoubt.lm import answer as answers
from selfdoubt.lm.answer import Alternative, Answer, Token, answer_scores, pick_risk
from selfdoubt.lm.decode import Event, Sampling, ScoredId, decode, read
from selfdoubt.lm.load import POCKET, Quantization, load_model
from selfdoubt.lm.prompt import Detokenizer, Message, Prompt, encode
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.members import Spec, Wrapped
from selfdoubt.risk import percentile
from selfdoubt.vote import Wrapper as Vote

Question = str | Sequence[Message]


class RiskAwareLM:
    """A causal language model whose every answer comes with a risk for each token and for the whole.

    Example:
        >>> lm = RiskAwareLM.load("pocket")
        >>> answer = lm.generate("What is the capital of France?")
        >>> answer.text
        'The capital of France is Paris.'
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        reference: Mapping[str, Sequence[float]] | None = None,
        risk: str = answers.DEFAULT_RISK,
        token_risk: str = answers.TOKEN_RISK,
    ) -> None:
        """Use ``load`` unless you have made the parts yourself.

        Args:
            model: A Hugging Face causal language model, wrapped or plain.
            tokenizer: Its tokenizer.
            reference: Ascending quantiles of answer scores, by name: they turn a risk into a percentile.
            risk: Name of the answer score that is the risk.
            token_risk: Name of the token score that is a token's risk.
        """
        if risk not in answers.ANSWER_SCORES:
            raise ConfigError(f"no answer score is called {risk!r}; choose one of {sorted(answers.ANSWER_SCORES)}")
        self.model = model
        self.tokenizer = tokenizer
        self.reference = dict(reference or {})
        self.risk = risk
        self.token_risk = token_risk
        self._stop_ids = _stop_ids(model, tokenizer)

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str] = POCKET,
        *,
        wrapper: Spec | Literal["auto"] | None = "auto",
        adapter: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        quantize: Quantization | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        token: str | None = None,
        risk: str = answers.DEFAULT_RISK,
    ) -> RiskAwareLM:
        """Load a model and make it aware of its risk.

        Args:
            name: A folder, a name on the hub, or "pocket".
            wrapper: A ``vote``, ``sample`` or ``sculpt`` wrapper; None leaves the model plain. "auto" takes the voters
                that come with the pocket model, and three fresh low-rank voters for any other.
            adapter: A folder that ``selfdoubt.save`` wrote; it brings its own wrapper.
            dtype: "auto" takes the checkpoint's own.
            device: None takes a GPU where there is one.
            quantize: "nf4" for 4-bit weights.
            revision: A branch, tag or commit on the hub.
            trust_remote_code: Run code that comes with the model.
            token: A hub token for gated models; None takes ``HF_TOKEN``.
            risk: Name of the answer score that is the risk.

        Raises:
            LoadError: If the model or the adapter cannot be read.
            BaseMismatchError: If the adapter was made for another model.
            ConfigError: If an option is out of range, or both a wrapper and an adapter are given.
        """
        if adapter is not None and wrapper not in ("auto", None):
            raise ConfigError("an adapter brings its own wrapper: give either adapter=... or wrapper=...")
        if adapter is not None:
            storage.read_card(Path(adapter))  # a wrong folder is said before a large model loads
        model, tokenizer = load_model(
            name, dtype=dtype, device=device, quantize=quantize, revision=revision,
            trust_remote_code=trust_remote_code, token=token,
        )  # fmt: skip
        if adapter is None and wrapper == "auto" and os.fspath(name) == POCKET:
            from selfdoubt import pocket

            adapter = pocket.voters()
        reference = None
        if adapter is not None:
            model = storage.load(adapter, model)
            reference = storage.read_card(Path(adapter)).get("reference")
        elif wrapper is not None:
            spec = Vote(n_voters=3, rank=16) if wrapper == "auto" else wrapper
            model = spec(model)  # type: ignore[operator]
        return cls(model.eval(), tokenizer, reference=reference, risk=risk)

    @overload
    def generate(self, prompt: str, **options: Any) -> Answer: ...
    @overload
    def generate(self, prompt: Sequence[str] | Sequence[Message], **options: Any) -> Any: ...
    def generate(
        self,
        prompt: Question | Sequence[Question],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str | int] = (),
        raw: bool = False,
        candidates: int | None = None,
        batch_size: int = 32,
    ) -> Answer | list[Answer]:
        """Answer a question, a chat, or a list of either.

        Args:
            prompt: A question, messages with ``role`` and ``content``, or a list of questions or chats.
            max_tokens: Most tokens of an answer.
            temperature: 0 takes the most probable token each time.
            top_p: Draw from the smallest set of tokens that holds this share of probability.
            seed: Same seed, same answer, alone or in a batch.
            stop: Tokens that end an answer: ids, or texts of one token each.
            raw: Continue the text as it is, without the chat template.
            candidates: Give this many answers to one question (seeds ``seed``, ``seed + 1``, ...), the least risky first.
            batch_size: How many prompts run side by side.

        Returns:
            One ``Answer``; a list of them for a list of prompts or with ``candidates``.

        Raises:
            PromptError: If a prompt is empty or too long.
            NonFiniteError: If the model gives NaN or infinite logits.
        """
        single = isinstance(prompt, str) or not prompt or isinstance(prompt[0], Mapping)
        questions: list[Any] = [prompt] if single else list(prompt)
        if candidates is not None:
            if candidates < 1 or not single:
                raise ConfigError(f"candidates must be at least 1 and for one question, got {candidates}")
            questions = questions * candidates
        seeds = [seed + i if candidates else seed for i in range(len(questions))]
        sampling = self._sampling(max_tokens, temperature, top_p, stop)
        prompts = [encode(self.tokenizer, q, raw=raw) for q in questions]
        found: list[Answer] = []
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            streams = self._run(prompts[part], sampling, seeds[part])
            found += [stream.answer for stream in streams]
        if candidates is not None:
            return sorted(found, key=lambda a: _candidate_risk(a))
        return found[0] if single else found

    def stream(
        self,
        prompt: Question,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str | int] = (),
        raw: bool = False,
    ) -> Stream:
        """Answer a question token by token; see ``generate`` for the options.

        Returns:
            An iterator of ``Token``. Its ``question`` holds the question's tokens at once, its ``answer`` the ``Answer``
            at the end.
        """
        sampling = self._sampling(max_tokens, temperature, top_p, stop)
        return Stream(self, encode(self.tokenizer, prompt, raw=raw), sampling, seed)

    def score(self, text: str, question: Question | None = None, *, raw: bool = False) -> Answer:
        """Risk of text that exists already, teacher-forced.

        Args:
            text: The answer to score, or with no question any text.
            question: What it answers.
            raw: Do not put the question into the chat template.

        Raises:
            PromptError: If the text is empty or too long.
        """
        if not text.strip():
            raise PromptError("the text to score is empty")
        if question is None:
            prompt = Prompt([], [])
            ids = encode(self.tokenizer, text, raw=True).ids
            skip = 1 if ids[0] == self.tokenizer.bos_token_id else 0
        else:
            prompt = encode(self.tokenizer, question, raw=raw)
            ids = prompt.ids + list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            skip = len(prompt.ids)
        scored, _ = read(HFStepper(self.model), [ids], 5)
        pieces = Detokenizer(self.tokenizer)
        tokens = [self._token(t, pieces.add(t.id)) for t in scored[0][skip:] if t is not None]
        return self.answer(tokens, self._own(scored[0], prompt), "given", text)

    def answer(
        self, tokens: Sequence[Token], question: Sequence[Token], finish: Literal["stop", "length", "given"], text: str
    ) -> Answer:
        """Put tokens together and score the whole."""
        scores = answer_scores(tokens, question)
        value, name = pick_risk(scores, self.risk)
        reference = self.reference.get(name)
        rank = None if reference is None else percentile(value, reference)
        return Answer(text, tuple(tokens), tuple(question), scores, value, name, rank, finish)

    def _run(self, prompts: list[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[_Sequence]:
        stepper = HFStepper(self.model)
        ids = [p.ids for p in prompts]
        scored, following = read(stepper, ids)
        runs = [_Sequence(self, self._own(s, p)) for s, p in zip(scored, prompts, strict=True)]
        for event in decode(stepper, following, [len(i) for i in ids], sampling, seeds):
            runs[event.sequence].add(event)
        return runs

    def _own(self, scored: list[ScoredId | None], prompt: Prompt) -> list[Token]:
        """Tokens of the question's own words."""
        pieces = Detokenizer(self.tokenizer)
        pairs = zip(scored, prompt.own, strict=False)
        return [self._token(t, pieces.add(t.id)) for t, own in pairs if own and t is not None]

    def _token(self, scored: ScoredId, text: str) -> Token:
        plain = scored._asdict()
        options = tuple(
            Alternative(self.tokenizer.decode([i]), i, float(torch.tensor(p).exp())) for i, p in plain.pop("alternatives")
        )
        value = -scored.logprob if self.token_risk == "nll" else getattr(scored, self.token_risk)
        return Token(text=text, **plain, risk=value, alternatives=options)

    def _sampling(self, max_tokens: int, temperature: float, top_p: float, stop: Sequence[str | int]) -> Sampling:
        stops = set(self._stop_ids)
        for item in stop:
            ids = [item] if isinstance(item, int) else self.tokenizer(item, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ConfigError(f"stop must be one token each, and {item!r} is {len(ids)} tokens in this vocabulary")
            stops.add(ids[0])
        return Sampling(temperature, top_p, max_tokens, frozenset(stops))


class _Sequence:
    """One answer in the making."""

    def __init__(self, lm: RiskAwareLM, question: list[Token]) -> None:
        self.lm = lm
        self.question = question
        self.tokens: list[Token] = []
        self.finish: Literal["stop", "length"] | None = None
        self._pieces = Detokenizer(lm.tokenizer)

    def add(self, event: Event) -> Token | None:
        token = None
        if event.token is not None:
            token = self.lm._token(event.token, self._pieces.add(event.token.id))
            self.tokens.append(token)
        self.finish = event.finish
        return token

    @property
    def answer(self) -> Answer:
        assert self.finish is not None
        text = "".join(t.text for t in self.tokens) + self._pieces.flush()
        return self.lm.answer(self.tokens, self.question, self.finish, text)


class Stream(Iterator[Token]):
    """Tokens as they are chosen. ``question`` is there from the start, ``answer`` when the tokens have ended."""

    def __init__(self, lm: RiskAwareLM, prompt: Prompt, sampling: Sampling, seed: int) -> None:
        stepper = HFStepper(lm.model)
        scored, following = read(stepper, [prompt.ids])
        self._sequence = _Sequence(lm, lm._own(scored[0], prompt))
        self._events = decode(stepper, following, [len(prompt.ids)], sampling, [seed])

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
        if self._sequence.finish is None:
            raise ConfigError("the answer is not finished; read the stream to its end first")
        return self._sequence.answer

    def __next__(self) -> Token:
        for event in self._events:
            token = self._sequence.add(event)
            if token is not None:
                return token
        raise StopIteration


def _candidate_risk(answer: Answer) -> float:
    """Candidates share their question, so only scores of the answer can order them."""
    return answer.scores.get("mean_total", float("inf"))


def _stop_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    base = model
    while isinstance(base, Wrapped):
        base = base.module
    config = getattr(base, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found, tokenizer.eos_token_id]
    return frozenset(i for i in ids if i is not None)
