"""A language model that knows what it doesn't know: generate, stream and score text with a risk for every token."""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Literal, Unpack, cast, overload

import torch
from torch import nn

from selfdoubt.errors import ConfigError, UntrainedWarning
from selfdoubt.lm.adapters.adapter import base_of, check_adapter, load_adapter, own_tokenizer, read_adapter
from selfdoubt.lm.answer import Alternative, Answer, Token
from selfdoubt.lm.calibration import Calibration, Estimate, read_calibration
from selfdoubt.lm.conditions import Origin
from selfdoubt.lm.generation import Stream, generate_batch
from selfdoubt.lm.hidden_states import AnswerStates
from selfdoubt.lm.inputs import Question, check_question, is_chat, list_pairs, list_questions
from selfdoubt.lm.load import POCKET, Quantization, choose_dtype, find_stop_ids, load_model, vocabulary_size
from selfdoubt.lm.notes import PLAIN_NOTE, untrained_note
from selfdoubt.lm.options import Options, read_number, read_options, read_sampling, read_seed, stop_texts
from selfdoubt.lm.prefill import ScoredId
from selfdoubt.lm.scores import (
    DEFAULT_RISK,
    RANK_SCORES,
    TOKEN_RISK,
    Score,
    Signal,
    answer_scores,
    check_score,
    pick_risk,
    rank_scores,
)
from selfdoubt.lm.scoring import score_teacher_forced
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.text.detokenizer import TextsBetween
from selfdoubt.lm.text.prompt import encode
from selfdoubt.lm.until import Attempts, generate_until
from selfdoubt.members import Spec, check_spec, source
from selfdoubt.risk import percentile


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
        risk: str = DEFAULT_RISK,
        token_risk: Signal = TOKEN_RISK,
        layers: Sequence[int] = (),
        note: str | None = None,
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
            note: One line for people on what this model's risk lacks, e.g. that its members are untrained.
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
        self.note = note
        self.stop_ids = find_stop_ids(model, tokenizer)
        self.context = HFStepper(model).context  #: most tokens of prompt and answer together, or None
        self.name = source(model)  #: a folder, or a name on the hub; None where the model's config has none
        self.vocabulary = vocabulary_size(model)
        self._texts = TextsBetween(tokenizer)

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
        risk: str = DEFAULT_RISK,
        layers: Sequence[int] = (),
    ) -> RiskAwareLM:
        """Load a model and make it aware of its risk.

        Args:
            name: A folder, a name on the hub, or "pocket"; None takes the adapter's base, or "pocket".
            wrapper: A ``vote``, ``sample`` or ``sculpt`` wrapper, untrained; None leaves the model plain. "auto" takes
                what comes with the adapter or the pocket model, and leaves any other model plain: its answers are
                its own, and its risk is its own surprisal and entropy.
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

        Warns:
            UntrainedWarning: If a wrapper is given: its members change the answers, and nothing has trained them.
        """
        given = None if wrapper == "auto" else wrapper
        if given is not None:
            check_spec(given)
        if adapter is not None:
            check_adapter(adapter, given)  # a wrong folder is said before a large model loads
            if name is None:
                name, revision = base_of(adapter, None, revision)
        name = POCKET if name is None else name
        model, tokenizer = load_model(
            name, words=None if adapter is None else own_tokenizer(adapter), dtype=dtype, device=device,
            quantize=quantize, revision=revision, trust_remote_code=trust_remote_code, token=token,
        )  # fmt: skip
        if dtype == "auto" and quantize is None:
            model = model.to(choose_dtype(model))
        if adapter is None and wrapper == "auto" and os.fspath(name) == POCKET:
            from selfdoubt import pocket

            adapter = pocket.voters_folder()
        manifest: dict[str, Any] = {}
        if adapter is not None:
            manifest = read_adapter(adapter, given) or {}
            model = load_adapter(model, adapter, given)
        elif given is not None:
            with torch.random.fork_rng():  # what is fresh is the same each time: a run can go on, an answer come again
                torch.manual_seed(0)
                model = given(model)  # type: ignore[operator]
        note = None
        if given is not None:
            note = untrained_note(given)
            warnings.warn(note, UntrainedWarning, stacklevel=2)
        elif wrapper == "auto" and not manifest:
            note = PLAIN_NOTE
        learnt: dict[str, Any] = {"reference": manifest.get("reference"), "calibration": read_calibration(manifest)}
        return cls(model.eval(), tokenizer, **learnt, risk=risk, layers=layers, note=note)

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> Answer: ...
    @overload
    def generate(
        self,
        prompt: Iterable[Any],
        *,
        batch_size: int = ...,
        seeds: Sequence[int] | None = ...,
        **options: Unpack[Options],
    ) -> Any: ...
    def generate(
        self,
        prompt: Question | Iterable[Question],
        *,
        batch_size: int = 32,
        seeds: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Answer | list[Answer]:
        """Answer a question or a chat, or a list of either.

        Args:
            prompt: A question, messages with ``role`` and ``content``, or a list of questions or chats; also a
                generator, a column of pandas or Arrow, or an array.
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
        options = read_options(options, "batch_size", "seeds")
        seed = options.get("seed", 0)
        if isinstance(prompt, str) or is_chat(prompt):
            return self._generate([cast("Question", prompt)], 1, [seed], options)[0]
        prompts = list_questions(prompt)
        seeds = [seed] * len(prompts) if seeds is None else [read_seed("each of the seeds", i) for i in seeds]
        if len(seeds) != len(prompts):
            raise ConfigError(f"there must be one seed for each prompt, got {len(seeds)} for {len(prompts)}")
        return self._generate(prompts, batch_size, seeds, options)

    def candidates(self, prompt: Question, n: int, *, batch_size: int = 32, **options: Unpack[Options]) -> list[Answer]:
        """Draw ``n`` answers to one question with the seeds ``seed``, ``seed + 1``, ...; the least risky comes first.

        Raises:
            ConfigError: If ``n`` is below 1, or the temperature is 0, which would give the same answer each time.
        """
        n = int(read_number("n", n, whole=True))
        if n < 1:
            raise ConfigError(f"the number of candidates must be at least 1, got {n}")
        options = read_options(options, "batch_size")
        options.setdefault("temperature", 1.0)
        if options["temperature"] == 0 and n > 1:
            raise ConfigError("candidates at temperature 0 are all the same; use a temperature above 0, e.g. 1")
        seeds = [options.get("seed", 0) + i for i in range(n)]
        found = self._generate([check_question(prompt)] * n, batch_size, seeds, options)
        # Candidates share their question: where only it makes the risk, the same score of the answer orders them.
        bare = self.risk if self.risk in RANK_SCORES else str(replace(Score.parse(self.risk), part="answer"))
        return sorted(found, key=lambda a: (a.risk, a.scores.get(bare, math.inf)))

    def generate_until(
        self, prompt: Question, percentile: float, *, max_tries: int = 10, **options: Unpack[Options]
    ) -> Attempts:
        """Answer again, with the seeds ``seed``, ``seed + 1``, ..., until the answer is among the surest.

        Args:
            prompt: A question or messages.
            percentile: Largest share of reference answers with a lower risk, in [0, 1].
            max_tries: Most answers, at least 1.
            **options: See ``Options``; the temperature is 1 unless given.

        Raises:
            ConfigError: If there are no reference answers for the risk, or a number is out of range.
        """
        options = read_options(options, "max_tries")
        return generate_until(self, check_question(prompt), percentile, max_tries, options)

    def stream(self, prompt: Question, **options: Unpack[Options]) -> Stream:
        """Answer a question token by token.

        Returns:
            An iterator of ``Token``. Its ``question`` holds the question's tokens at once, its ``answer`` the
            ``Answer`` at the end.

        Raises:
            As ``generate``.
        """
        options = read_options(options)
        encoded = encode(self.tokenizer, check_question(prompt), raw=options.get("raw", False))
        sampling = read_sampling(options, self.stop_ids)
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
            ConfigError: If ``raw`` or ``alternatives`` is of a wrong type, or negative.
        """
        raw = read_options({"raw": raw}).get("raw", False)
        if read_number("alternatives", alternatives, whole=True) < 0:
            raise ConfigError(f"alternatives must not be negative, got {alternatives}")
        return score_teacher_forced(self, list_pairs(pairs), raw=raw, alternatives=alternatives)

    def answer(
        self, tokens: Sequence[Token], question: Sequence[Token], finish: Literal["stop", "length", "given"], text: str,
        states: AnswerStates | None = None, ending: Sequence[Token] = (), *, origin: Origin,
    ) -> Answer:  # fmt: skip
        """Put tokens together and score the whole.

        What ended an answer without tokens is what it is scored by; ``origin`` says how the tokens came about.
        """
        scores = answer_scores(tokens or ending, question)
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

    def _token(self, scored: ScoredId, text: str) -> Token:
        plain = scored._asdict()
        # A space that the chosen token lost in its place, its alternatives would lose there, too.
        lost = bool(scored.alternatives) and self._texts[scored.id] == f" {text}"
        named = [(self._texts[i].removeprefix(" " if lost else ""), i, p) for i, p in plain.pop("alternatives")]
        options = tuple(Alternative(words, i, math.exp(p)) for words, i, p in named)
        value = 0.0 - scored.logprob if self.token_risk == "nll" else getattr(scored, self.token_risk)
        return Token(text=text, **plain, risk=value, alternatives=options)

    def _generate(
        self, prompts: Sequence[Question], batch_size: int, seeds: Sequence[int], options: Options
    ) -> list[Answer]:
        if read_number("batch_size", batch_size, whole=True) < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        sampling, stops = read_sampling(options, self.stop_ids), stop_texts(options)
        encoded = [encode(self.tokenizer, prompt, raw=options.get("raw", False)) for prompt in prompts]
        found: list[Answer] = []
        for first in range(0, len(encoded), batch_size):
            part = slice(first, first + batch_size)
            sequences, steps = generate_batch(self, encoded[part], sampling, seeds[part], stops)
            deque(steps, maxlen=0)
            found += [sequence.answer for sequence in sequences]
        return found
