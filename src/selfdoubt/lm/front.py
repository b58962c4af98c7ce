"""``LMFront``: everything about a risk-aware language model except its weights, small enough to send to a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer_scorer import AnswerScorer
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.load import count_token_ids, find_stop_ids
from selfdoubt.lm.scores import (
    ANSWER_SCORES,
    DEFAULT_RISK,
    RANK_SCORES,
    TOKEN_RISK,
    Signal,
    check_score,
    check_signal,
    choose_default_risk,
    compares_members_on_question,
    fallback_score,
)
from selfdoubt.lm.step_modes import StepMode
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.tokens import TokenBuilder
from selfdoubt.members import Wrapped
from selfdoubt.wrapping import get_source


@dataclass(frozen=True)
class LMFront:
    """Everything about a risk-aware language model without the model: it encodes, builds tokens and scores answers.

    It is small enough to send to a process that takes requests for a model that runs elsewhere.
    """

    tokenizer: Any
    architecture: str  #: the model as ``print`` shows it
    vocabulary: int  #: token ids that the model reads
    stop_ids: frozenset[int]  #: token ids that end an answer
    context: int | None = None  #: most tokens of prompt and answer together; None without a limit
    name: str | None = None  #: a folder, or a name on the hub; None where the model's config has none
    revision: str | None = None  #: revision of the model on the hub
    reference: Mapping[str, Sequence[float]] = field(default_factory=dict)  #: ascending quantiles of scores, by name
    reference_size: int | None = None  #: number of answers that these are of; None if it is not known
    calibration: Calibration | None = None
    misfit: str | None = None  #: why no answer of this model has a p_correct; None if the calibration fits the model
    layers: tuple[int, ...] = ()  #: decoder layers whose hidden states come with an answer; 0 is the first
    risk: str = DEFAULT_RISK  #: name of the answer score that is the risk
    token_risk: Signal = TOKEN_RISK  #: name of the signal that is a token's risk
    note: str | None = None  #: one line on what this model's risk lacks
    members_read: Literal["prompt", "answer"] = "prompt"  #: the first tokens that members read

    def __post_init__(self) -> None:
        check_score(self.risk)
        check_signal(self.token_risk)
        score = ANSWER_SCORES.get(self.risk)
        if self.members_read == "answer" and score is not None and compares_members_on_question(score):
            of_answer = self.risk.removeprefix("question_").removeprefix("both_")
            raise ConfigError(
                f"risk={self.risk!r} compares members on the question, and with start='answer' these read the answer "
                f"only; use risk={of_answer!r}, or voters with start='prompt'"
            )

    @classmethod
    def read(
        cls,
        model: nn.Module,
        tokenizer: Any,
        *,
        reference: Mapping[str, Sequence[float]] | None = None,
        calibration: Calibration | None = None,
        layers: Sequence[int] = (),
        risk: str | None = None,
        token_risk: Signal = TOKEN_RISK,
        note: str | None = None,
    ) -> LMFront:
        """Build the front of a model from the model's config and what was stored with it.

        Raises:
            ConfigError: If the risk is unknown, or compares members on a question that they do not read.
        """
        return cls(
            tokenizer,
            str(model),
            count_token_ids(model),
            find_stop_ids(model, tokenizer),
            HFStepper(model).context,
            get_source(model),
            reference=dict(reference or {}),
            calibration=calibration,
            misfit=None if calibration is None else calibration.misfit(model),
            layers=tuple(sorted({*layers, *(() if calibration is None else calibration.layers)})),
            risk=choose_default_risk(reference or {}) if risk is None else risk,
            token_risk=token_risk,
            note=note,
            members_read=getattr(model.spec, "start", "prompt") if isinstance(model, Wrapped) else "prompt",
        )

    @cached_property
    def tokens(self) -> TokenBuilder:
        """The builder of tokens from scored ids."""
        return TokenBuilder(self.tokenizer, self.token_risk)

    @property
    def answer_risk(self) -> str:
        """The name of the score that answers have as their risk: without reference answers there are no ranks."""
        return self.risk if self.reference or self.risk not in RANK_SCORES else str(fallback_score(self.risk))

    @cached_property
    def scorer(self) -> AnswerScorer:
        """The scorer of answers."""
        return AnswerScorer(self.risk, self.reference, self.calibration, self.misfit, self.members_read)


@runtime_checkable
class ModelWithFront(Protocol):
    """The interface that generation and scoring need: a model and its front; ``RiskAwareLM`` has it."""

    @property
    def model(self) -> nn.Module:
        """The model, wrapped or plain."""

    @property
    def front(self) -> LMFront:
        """Everything about the model except its weights."""

    @property
    def step(self) -> StepMode:
        """The way in which its steps run, see ``step_modes``."""
