"""A language model that knows what it doesn't know: generate, stream and score text with a risk for every token."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Unpack, cast, overload

import torch
from torch import nn

from selfdoubt.errors import ConfigError
from selfdoubt.lm import answer as answers
from selfdoubt.lm.adapter import base_of, load_adapter, own_tokenizer, read_adapter
from selfdoubt.lm.answer import Alternative, Answer, Token, answer_scores, check_score, pick_risk, rank_scores, stand_in
from selfdoubt.lm.calibration import Calibration, Estimate, States, stored
from selfdoubt.lm.conditions import Origin
from selfdoubt.lm.given import score_given
from selfdoubt.lm.load import POCKET, Quantization, load_model, quick_dtype, stop_ids
from selfdoubt.lm.options import Options, sampling_of, stop_texts
from selfdoubt.lm.prompt import Detokenizer, Message, Prompt, encode
from selfdoubt.lm.reading import ScoredId
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.stream import Stream, answering
from selfdoubt.members import Spec, check_spec, innermost, source
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
        calibration: Calibration | None = None,
        risk: str = answers.DEFAULT_RISK,
        token_risk: str = answers.TOKEN_RISK,
        layers: Sequence[int] = (),
    ) -> None:
        """Use ``load`` unless you have made the parts yourself.

        Args:
            model: A Hugging Face causal language model, wrapped or plain.
            tokenizer: Its tokenizer.
            reference: Ascending quantiles of answer scores, by name: they turn a risk into a percentile.
            calibration: Turns scores into ``p_correct``, and says below which one to abstain.
            risk: Name of the answer score that is the risk.
            token_risk: Name of the token score that is a token's risk.
            layers: Decoder layers whose hidden states come with an answer (``Answer.states``); 0 is the first.
        """
        check_score(risk)
        self.model = model
        self.tokenizer = tokenizer
        self.reference = dict(reference or {})
        self.calibration = calibration
        self.misfit = None if calibration is None else calibration.misfit(model)  #: why no answer has a p_correct
        self.layers = tuple(sorted({*layers, *(() if calibration is None else calibration.layers)}))
        self.risk = risk
        self.token_risk = token_risk
        self.stop_ids = stop_ids(model, tokenizer)
        self.context = HFStepper(model).context  #: most tokens of prompt and answer together, or None
        self.name = source(model)  #: a folder, or a name on the hub; None where the model's config has none
        self.vocabulary: int = innermost(model).get_input_embeddings().num_embeddings  # type: ignore[operator]
        self._texts: dict[int, str] = {}

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str] | None = None,
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
        layers: Sequence[int] = (),
    ) -> RiskAwareLM:
        """Load a model and make it aware of its risk.

        Args:
            name: A folder, a name on the hub, or "pocket"; None takes the adapter's base, or "pocket".
            wrapper: A ``vote``, ``sample`` or ``sculpt`` wrapper; None leaves the model plain. "auto" takes the voters
                that come with the pocket model, and three fresh low-rank voters for any other.
            adapter: An adapter folder, which brings its own wrapper; or LoRA of plain PEFT, which goes with any.
            dtype: "auto" takes the checkpoint's own, or float32 on a CPU that only emulates bfloat16.
            device: None takes a GPU where there is one.
            quantize: "nf4" for 4-bit weights.
            revision: A branch, tag or commit on the hub.
            trust_remote_code: Run code that comes with the model.
            token: A hub token for gated models; None takes ``HF_TOKEN``.
            risk: Name of the answer score that is the risk.
            layers: Decoder layers whose hidden states come with an answer.

        Raises:
            LoadError: If the model or the adapter cannot be read.
            BaseMismatchError: If the adapter was made for another model.
            ConfigError: If an option is out of range, or a wrapper is given to an adapter that brings its own.
        """
        given = None if wrapper == "auto" else wrapper
        if given is not None:
            check_spec(given)
        if adapter is not None:
            read_adapter(adapter, given)  # a wrong folder is said before a large model loads
            if name is None:
                name, revision = base_of(adapter, None, revision)
        name = POCKET if name is None else name
        model, tokenizer = load_model(
            name, words=None if adapter is None else own_tokenizer(adapter), dtype=dtype, device=device,
            quantize=quantize, revision=revision, trust_remote_code=trust_remote_code, token=token,
        )  # fmt: skip
        if dtype == "auto" and quantize is None:
            model = model.to(quick_dtype(model))
        if adapter is None and wrapper == "auto" and os.fspath(name) == POCKET:
            from selfdoubt import pocket

            adapter = pocket.voters_folder()
        card: dict[str, Any] = {}
        if adapter is not None:
            card = read_adapter(adapter, given) or {}
            model = load_adapter(model, adapter, given)
        elif wrapper is not None:
            spec = given or Vote(n_voters=3, rank=16)
            with torch.random.fork_rng():  # what is fresh is the same each time: a run can go on, an answer come again
                torch.manual_seed(0)
                model = spec(model)  # type: ignore[operator]
        return cls(
            model.eval(), tokenizer, reference=card.get("reference"), calibration=stored(card), risk=risk, layers=layers
        )

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> Answer: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Any],
        *,
        batch_size: int = ...,
        seeds: Sequence[int] | None = ...,
        **options: Unpack[Options],
    ) -> Any: ...
    def generate(
        self,
        prompt: Question | Sequence[Question],
        *,
        batch_size: int = 32,
        seeds: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Answer | list[Answer]:
        """Answer a question or a chat, or a list of either.

        Args:
            prompt: A question, messages with ``role`` and ``content``, or a list of questions or chats.
            batch_size: How many prompts of a list run side by side.
            seeds: One for each prompt of a list; None takes the option ``seed`` for all.
            **options: See ``Options``.

        Returns:
            One ``Answer``, or a list of them for a list of prompts.

        Raises:
            PromptError: If a prompt is empty or too long.
            ConfigError: If an option is out of range.
            NonFiniteError: If the model gives NaN or infinite logits.
        """
        seed = options.get("seed", 0)
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            return self._generate([cast("Question", prompt)], 1, [seed], options)[0]
        seeds = [seed] * len(prompt) if seeds is None else seeds
        if len(seeds) != len(prompt):
            raise ConfigError(f"there must be one seed for each prompt, got {len(seeds)} for {len(prompt)}")
        return self._generate(cast("Sequence[Question]", prompt), batch_size, seeds, options)

    def candidates(self, prompt: Question, n: int, *, batch_size: int = 32, **options: Unpack[Options]) -> list[Answer]:
        """Draw ``n`` answers to one question with the seeds ``seed``, ``seed + 1``, ...; the least risky comes first.

        Raises:
            ConfigError: If ``n`` is below 1, or the temperature is 0, which would give the same answer each time.
        """
        if n < 1:
            raise ConfigError(f"the number of candidates must be at least 1, got {n}")
        options.setdefault("temperature", 1.0)
        if options["temperature"] == 0 and n > 1:
            raise ConfigError("candidates at temperature 0 are all the same; use a temperature above 0, e.g. 1")
        seeds = [options.get("seed", 0) + i for i in range(n)]
        found = self._generate([prompt] * n, batch_size, seeds, options)
        # Candidates share their question: where only it makes the risk, the same score of the answer orders them.
        bare = self.risk.removeprefix("question_")
        return sorted(found, key=lambda a: (a.risk, a.scores.get(bare, math.inf)))

    def generate_until(
        self, prompt: Question, percentile: float, *, max_tries: int = 10, **options: Unpack[Options]
    ) -> Tries:
        """Answer again, with the seeds ``seed``, ``seed + 1``, ..., until the answer is among the surest.

        Args:
            prompt: A question or messages.
            percentile: Largest share of reference answers with a lower risk, in [0, 1].
            max_tries: Most answers, at least 1.
            **options: See ``Options``; the temperature is 1 unless given.

        Raises:
            ConfigError: If there are no reference answers for the risk, or a number is out of range.
        """
        if not 0 <= percentile <= 1:
            raise ConfigError(f"the percentile must be between 0 and 1, got {percentile}")
        if max_tries < 1:
            raise ConfigError(f"max_tries must be at least 1, got {max_tries}")
        if not {self.risk, stand_in(self.risk)} & set(self.reference):
            raise ConfigError(
                f"a percentile of {self.risk} needs reference answers, and this model has none; "
                "use an adapter that has them (the pocket model does)"
            )
        options.setdefault("temperature", 1.0)
        first = options.get("seed", 0)
        tried: list[Answer] = []
        for i in range(max_tries):
            tried += self._generate([prompt], 1, [first + i], options)
            rank = tried[-1].percentile
            if rank is not None and rank <= percentile:
                return Tries(tried[-1], i + 1, True)
        return Tries(min(tried, key=lambda a: a.risk), max_tries, False)

    def stream(self, prompt: Question, **options: Unpack[Options]) -> Stream:
        """Answer a question token by token.

        Returns:
            An iterator of ``Token``. Its ``question`` holds the question's tokens at once, its ``answer`` the
            ``Answer`` at the end.

        Raises:
            As ``generate``.
        """
        encoded = encode(self.tokenizer, prompt, raw=options.get("raw", False))
        sampling = sampling_of(options, self.stop_ids)
        return Stream(self, encoded, sampling, options.get("seed", 0), stop_texts(options))

    def score(self, text: str, question: Question | None = None, *, raw: bool = False) -> Answer:
        """Risk of text that exists already, teacher-forced.

        Args:
            text: The answer to score, or with no question any text.
            question: What it answers.
            raw: Do not put the question into the chat template.

        Raises:
            PromptError: If the text is empty or too long.
        """
        return self.score_batch([(question, text)], raw=raw)[0]

    def score_batch(
        self, pairs: Sequence[tuple[Question | None, str]], *, raw: bool = False, alternatives: int = 5
    ) -> list[Answer]:
        """Risk of several texts side by side, each the answer to its question or, with None, any text.

        Args:
            pairs: Questions and their answers.
            raw: Do not put questions into the chat template; a text then follows its question without a space.
            alternatives: How many of the most probable tokens are told with each token.

        Raises:
            PromptError: If a text is empty or too long.
        """
        return score_given(self, pairs, raw=raw, alternatives=alternatives)

    def answer(
        self, tokens: Sequence[Token], question: Sequence[Token], finish: Literal["stop", "length", "given"], text: str,
        states: States | None = None, *, origin: Origin,
    ) -> Answer:  # fmt: skip
        """Put tokens together and score the whole; ``origin`` says how they came about."""
        scores = answer_scores(tokens, question)
        scores |= rank_scores(scores, self.reference)
        value, name = pick_risk(scores, self.risk)
        reference = self.reference.get(name)
        rank = None if reference is None else percentile(value, reference)
        known, gaps = Estimate(), [token.gap for token in tokens]
        if self.calibration is not None:
            known = self.calibration.estimate(scores, states, origin, finish, gaps, self.misfit)
        return Answer(
            text, tuple(tokens), tuple(question), scores, value, name, rank, finish,
            known.p_correct, known.abstain, states, known.note,
        )  # fmt: skip

    def without_weights(self) -> RiskAwareLM:
        """What knows all about this model, and cannot run it: small enough to send to whoever speaks for it."""
        paper = copy(self)
        paper.model = nn.Identity()
        return paper

    def _own(self, scored: list[ScoredId | None], prompt: Prompt) -> list[Token]:
        """Tokens of the question's own words."""
        pieces = Detokenizer(self.tokenizer)
        pairs = zip(scored, prompt.own, strict=False)
        return [self._token(t, pieces.add(t.id)) for t, own in pairs if own and t is not None]

    def _token(self, scored: ScoredId, text: str) -> Token:
        plain = scored._asdict()
        options = tuple(Alternative(self._text(i), i, math.exp(p)) for i, p in plain.pop("alternatives"))
        value = 0.0 - scored.logprob if self.token_risk == "nll" else getattr(scored, self.token_risk)
        return Token(text=text, **plain, risk=value, alternatives=options)

    def _text(self, token: int) -> str:
        """A token's text by itself; the same few tokens are asked for again and again."""
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]

    def _generate(
        self, prompts: Sequence[Question], batch_size: int, seeds: Sequence[int], options: Options
    ) -> list[Answer]:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        sampling, stops = sampling_of(options, self.stop_ids), stop_texts(options)
        encoded = [encode(self.tokenizer, prompt, raw=options.get("raw", False)) for prompt in prompts]
        found: list[Answer] = []
        for first in range(0, len(encoded), batch_size):
            part = slice(first, first + batch_size)
            sequences, steps = answering(self, encoded[part], sampling, seeds[part], stops)
            deque(steps, maxlen=0)
            found += [sequence.answer for sequence in sequences]
        return found


@dataclass(frozen=True)
class Tries:
    """The outcome of answering until confident: the first confident answer, or else the least risky."""

    answer: Answer
    tries: int
    confident: bool
