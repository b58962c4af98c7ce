"""A language model that knows what it doesn't know: generate, stream and score text with a risk for every token."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload

import torch
from torch import nn

from selfdoubt import storage
from selfdoubt.errors import ConfigError, UntrainedWarning
from selfdoubt.lm import defaults
from selfdoubt.lm.adapters.adapter import REFERENCE_SIZE, check_adapter, save_adapter
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.answer_from import AnswerFrom, check_answer_from, protect_answers, set_answer_from
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.confidence import confidence_order
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.generation import Stream, build_requests, generate_answers
from selfdoubt.lm.inputs import PromptLike, check_question, is_chat, list_pairs, list_questions
from selfdoubt.lm.load import POCKET, Quantization, choose_dtype, find_pocket_voters, load_model, name_base
from selfdoubt.lm.noise_search import search_noise
from selfdoubt.lm.notes import PLAIN_NOTE, explain_uncalibrated, explain_untrained
from selfdoubt.lm.options import Options, read_number, read_options, read_seed
from selfdoubt.lm.prepacked import set_prepacking
from selfdoubt.lm.scores import RANK_SCORES, TOKEN_RISK, Score, Signal, choose_default_risk
from selfdoubt.lm.scoring import score_teacher_forced
from selfdoubt.lm.step_modes import StepMode, check_step_mode, choose_step_mode
from selfdoubt.lm.until import Attempts, generate_until
from selfdoubt.spec import Spec, check_spec


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
        risk: str | None = None,
        token_risk: Signal = TOKEN_RISK,
        layers: Sequence[int] = (),
        note: str | None = None,
        step: StepMode = "auto",
    ) -> None:
        """Combine a model and a tokenizer that you have built yourself; otherwise use ``load``.

        Args:
            model: A Hugging Face causal language model, wrapped or plain.
            tokenizer: Its tokenizer.
            reference: Ascending quantiles of answer scores, by name: they turn a risk into a percentile.
            calibration: Calibration that turns scores into ``p_correct``, and may have a threshold to abstain below.
            risk: Name of the answer score that is the risk; None chooses by the reference answers.
            token_risk: Name of the token signal that is a token's risk.
            layers: Decoder layers whose hidden states come with an answer (``Answer.states``); 0 is the first.
            note: One line on what this model's risk lacks, e.g. that its members are untrained.
            step: Way in which steps of decoding run, see ``load``.

        Raises:
            ConfigError: If the risk or the way is unknown, or the model's device has no such way.
        """
        self.model = model
        self.step = check_step_mode(step)
        choose_step_mode(step, next(model.parameters()).device)  # an error now, not at the first token
        self._names_risk = risk is not None
        self._front = LMFront.read(
            model, tokenizer, reference=reference, calibration=calibration, layers=layers, risk=risk,
            token_risk=token_risk, note=note,
        )  # fmt: skip
        storage.register_owner(model, self)

    @property
    def front(self) -> LMFront:
        """Everything about the model except its weights: small enough to send to another process."""
        return self._front

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._front.tokenizer

    @property
    def name(self) -> str | None:
        """The model's folder or GGUF file, or its name on the hub; None where its config has none."""
        return self._front.name

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that gives answers their ``p_correct``."""
        return self._front.calibration

    @property
    def risk(self) -> str:
        """The name of the answer score that is the risk."""
        return self._front.risk

    @property
    def note(self) -> str | None:
        """One line on what this model's risk lacks."""
        return self._front.note

    @property
    def reference(self) -> Mapping[str, Sequence[float]]:
        """Ascending quantiles of answer scores, by name."""
        return self._front.reference

    @reference.setter
    def reference(self, reference: Mapping[str, Sequence[float]]) -> None:
        self.set_reference(reference)

    def set_reference(self, reference: Mapping[str, Sequence[float]], answers: int | None = None) -> None:
        """Replace the reference quantiles.

        Args:
            reference: Ascending quantiles of answer scores, by name.
            answers: Number of answers that they are of; None if it is not known.
        """
        risk = self._front.risk if self._names_risk else choose_default_risk(reference)
        self._front = replace(self._front, reference=dict(reference), reference_size=answers, risk=risk)

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers whose hidden states come with an answer."""
        return self._front.layers

    @layers.setter
    def layers(self, layers: Sequence[int]) -> None:
        self._front = replace(self._front, layers=tuple(layers))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self._front.stop_ids

    @stop_ids.setter
    def stop_ids(self, ids: Iterable[int]) -> None:
        self._front = replace(self._front, stop_ids=frozenset(ids))

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
        risk: str | None = None,
        layers: Sequence[int] = (),
        answer_from: AnswerFrom | None = None,
        step: StepMode = "auto",
        prepack: bool | None = None,
    ) -> RiskAwareLM:
        """Load a model and make it aware of its risk.

        Args:
            name: A folder, a GGUF file, a name on the hub, or "pocket"; None takes the adapter's base, or "pocket".
            wrapper: A ``vote``, ``sample`` or ``sculpt`` wrapper, untrained; None leaves the model plain. "auto" takes
                what comes with the adapter or the pocket model, and leaves any other model plain: its answers are
                its own, and its risk is its own surprisal and entropy. A wrapper with noise of size "auto" gets the
                largest that keeps the model's answers to a few questions (see ``search_noise``), which takes a while.
            adapter: An adapter folder, which brings its own wrapper; or LoRA of plain PEFT, which goes with any.
            dtype: "auto" takes the checkpoint's own, or float32 on a CPU that only emulates bfloat16.
            device: None takes a GPU where there is one.
            quantize: "nf4" for 4-bit weights.
            revision: A branch, tag or commit on the hub.
            trust_remote_code: Run code that comes with the model.
            token: A hub token for gated models; None takes ``HF_TOKEN``.
            risk: Name of the answer score that is the risk; None chooses by the reference answers.
            layers: Decoder layers whose hidden states come with an answer.
            answer_from: "base" lets the base model answer in a row of its own, while voters or samples only say how
                far they disagree with it; "mean" answers with their mean. None takes the base for a ``wrapper`` that
                leaves it open, as its members are untrained, and what an adapter says for the adapter's.
            step: Way in which steps of decoding run: "eager" over a cache that grows, "static" over one of fixed sizes,
                "captured" as CUDA graphs of the static step, "compiled" by ``torch.compile``, and captured on a GPU.
                "auto" captures on a GPU and is eager elsewhere. Answers are the same, but for rounding.
            prepack: Keep copies of the weights that a CPU reads faster, see ``prepacked``; None does where they fit.

        Raises:
            LoadError: If the model or the adapter cannot be read.
            BaseMismatchError: If the adapter was made for another model.
            ConfigError: If an option is out of range, or a wrapper is given to an adapter that brings its own, or
                ``answer_from`` to a model without members.

        Warns:
            UntrainedWarning: If a wrapper is given: nothing has trained its members.
        """
        check_answer_from(answer_from)
        check_step_mode(step)
        given = None if wrapper == "auto" else wrapper
        if given is not None:
            check_spec(given)
            given = protect_answers(given, answer_from)
        # The adapter is read and checked once, before a large model loads.
        added = None if adapter is None else check_adapter(adapter, given)
        if name is None:
            name, revision = (POCKET, revision) if added is None else added.choose_base(None, revision)
        model, tokenizer = load_model(
            name, tokenizer=None if added is None else added.tokenizer, dtype=dtype, device=device,
            quantize=quantize, revision=revision, trust_remote_code=trust_remote_code, token=token,
        )  # fmt: skip
        if dtype == "auto" and quantize is None:
            model = model.to(choose_dtype(model))
        if added is None and wrapper == "auto" and os.fspath(name) == POCKET:
            added = check_adapter(find_pocket_voters())
        if added is not None:
            model = added.apply(model, given)
        elif given is not None:
            with torch.random.fork_rng():  # fresh parameters are the same each time, so that answers can be repeated
                torch.manual_seed(0)
                model = given(model)  # type: ignore[operator]
        if answer_from is not None:
            set_answer_from(model, answer_from)
        note = None
        if given is not None:
            note = explain_untrained(given)
            warnings.warn(note, UntrainedWarning, stacklevel=2)
        elif added is not None and added.manifest is not None:
            if added.calibration is None:
                note = explain_uncalibrated(added.reference_size, has_reference=bool(added.reference))
        elif wrapper == "auto":
            note = PLAIN_NOTE
        reference, calibration = (None, None) if added is None else (added.reference, added.calibration)
        set_prepacking(model, prepack)
        lm = cls(
            model.eval(), tokenizer, reference=reference, calibration=calibration, risk=risk, layers=layers, note=note,
            step=step,
        )  # fmt: skip
        size = None if added is None else added.reference_size
        lm._front = replace(lm._front, revision=revision, reference_size=size)
        if given is not None and getattr(given, "seeks_noise", False):
            search_noise(lm)
        return lm

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        base: str | None = None,
        revision: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write all that was added to the base model: wrappers, LoRA, reference answers, calibration and tokenizer.

        ``RiskAwareLM.load(adapter=folder)`` then gives the same answers, percentiles and p_correct. The base model
        itself is not written.

        Args:
            folder: Folder to write, made if missing; an adapter in it is replaced.
            base: Name or folder of the base model; None takes the model's own.
            revision: Revision of the base model.
            about: More entries for ``selfdoubt.json``, for people who read the file.

        Returns:
            The folder.

        Raises:
            WrapError: If nothing was added to the base model, not even reference answers or a calibration.
        """
        front = self._front
        extra: dict[str, Any] = dict(about or {})
        if front.reference:
            extra["reference"] = {name: list(quantiles) for name, quantiles in front.reference.items()}
            extra |= {} if front.reference_size is None else {REFERENCE_SIZE: front.reference_size}
        if front.calibration is not None:
            extra["calibration"] = front.calibration.to_json()
        return save_adapter(
            self.model, folder, base=base or name_base(front.name), revision=revision or front.revision,
            extra=extra, tokenizer=front.tokenizer,
        )  # fmt: skip

    def replace_model(self, model: nn.Module) -> None:
        """Answer with another wrapping of the same base model from now on."""
        self.model = model
        self._front = replace(self._front, architecture=str(model))
        storage.register_owner(model, self)

    def learnt(self) -> frozenset[str]:
        """Return the entries that this model has in addition to its weights: "reference", "calibration"."""
        known = {"reference": bool(self._front.reference), "calibration": self._front.calibration is not None}
        return frozenset(name for name, is_there in known.items() if is_there)

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
        prompt: PromptLike | Iterable[PromptLike],
        *,
        batch_size: int = defaults.BATCH_SIZE,
        seeds: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Answer | list[Answer]:
        """Answer a question or a chat, or a list of either.

        Args:
            prompt: A question, messages with ``role`` and ``content``, or a list of questions or chats; also a
                generator, a column of pandas or Arrow, or an array.
            batch_size: Number of prompts of a list that run in one batch.
            seeds: One seed per prompt of a list; None takes the option ``seed`` for all.
            **options: See ``Options``.

        Returns:
            One ``Answer``, or a list of them for a list of prompts.

        Raises:
            PromptError: If a prompt is empty or too long.
            ConfigError: If an option is out of range.
            NonFiniteError: If the model gives NaN or infinite logits.
        """
        options = read_options(options, "batch_size", "seeds")
        seed = options.get("seed", defaults.SEED)
        if isinstance(prompt, str) or is_chat(prompt):
            return generate_answers(self, [cast("PromptLike", prompt)], 1, [seed], options)[0]
        prompts = list_questions(prompt)
        seeds = [seed] * len(prompts) if seeds is None else [read_seed("each of the seeds", i) for i in seeds]
        if len(seeds) != len(prompts):
            raise ConfigError(f"there must be one seed for each prompt, got {len(seeds)} for {len(prompts)}")
        return generate_answers(self, prompts, batch_size, seeds, options)

    def candidates(
        self, prompt: PromptLike, n: int, *, batch_size: int = defaults.BATCH_SIZE, **options: Unpack[Options]
    ) -> list[Answer]:
        """Draw ``n`` answers to one question with the seeds ``seed``, ``seed + 1``, ..., the most confident first.

        See ``Answer.confidence``; of equally confident ones, the least risky comes first.

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
        seeds = [options.get("seed", defaults.SEED) + i for i in range(n)]
        answers = generate_answers(self, [check_question(prompt)] * n, batch_size, seeds, options)
        # Candidates share their question: where only it makes the risk, the same score of the answer orders them.
        alone = self.risk if self.risk in RANK_SCORES else str(replace(Score.parse(self.risk), part="answer"))
        return sorted(answers, key=lambda a: (*confidence_order(a), a.scores.get(alone, math.inf)))

    def generate_until(
        self,
        prompt: PromptLike,
        percentile: float,
        *,
        max_tries: int = defaults.MAX_ATTEMPTS,
        **options: Unpack[Options],
    ) -> Attempts:
        """Answer again, with the seeds ``seed``, ``seed + 1``, ..., until an answer is confident.

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

    def stream(self, prompt: PromptLike, **options: Unpack[Options]) -> Stream:
        """Answer a question token by token.

        Returns:
            An iterator of ``Token``. Its ``question`` holds the question's tokens at once, its ``answer`` the
            ``Answer`` at the end.

        Raises:
            PromptError: If the prompt is empty or too long.
            ConfigError: If an option is out of range.
            NonFiniteError: If the model gives NaN or infinite logits.
        """
        options = read_options(options)
        (request,) = build_requests(
            self._front, [check_question(prompt)], options, [options.get("seed", defaults.SEED)]
        )
        return Stream(self, request)

    def score(self, text: str, question: PromptLike | None = None, *, raw: bool = False) -> Answer:
        """Score text that exists already, teacher-forced.

        Args:
            text: The answer to score, or with no question any text.
            question: A question or messages; None where the text answers none.
            raw: Do not put the question into the chat template.

        Raises:
            PromptError: If the text is empty or too long.
        """
        return self.score_batch([(question, text)], raw=raw)[0]

    def score_batch(
        self,
        pairs: Sequence[tuple[PromptLike | None, str]],
        *,
        raw: bool = False,
        alternatives: int = defaults.ALTERNATIVES,
    ) -> list[Answer]:
        """Score several texts in one batch, each the answer to its question or, with None, any text.

        Args:
            pairs: Questions and their answers.
            raw: Do not put questions into the chat template; a text then follows its question without a space.
            alternatives: Number of the most probable tokens that come with each token.

        Raises:
            PromptError: If a text is empty or too long.
            ConfigError: If ``raw`` or ``alternatives`` is of a wrong type, or negative.
        """
        raw = read_options({"raw": raw}).get("raw", False)
        if read_number("alternatives", alternatives, whole=True) < 0:
            raise ConfigError(f"alternatives must not be negative, got {alternatives}")
        return score_teacher_forced(self, list_pairs(pairs), raw=raw, alternatives=alternatives)
