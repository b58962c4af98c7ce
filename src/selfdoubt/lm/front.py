"""``LMFront``: everything about a risk-aware language model except its weights, small enough to send to a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import nn

from selfdoubt.lm.answer_scorer import AnswerScorer
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.load import count_token_ids, find_stop_ids
from selfdoubt.lm.scores import DEFAULT_RISK, TOKEN_RISK, Signal, check_score, check_signal, choose_default_risk
from selfdoubt.lm.step_modes import StepMode
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.tokens import TokenBuilder
from selfdoubt.members import get_source


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

    def __post_init__(self) -> None:
        check_score(self.risk)
        check_signal(self.token_risk)

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
            ConfigError: If the risk is unknown.
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
        )

    @cached_property
    def tokens(self) -> TokenBuilder:
        """The builder of tokens from scored ids."""
        return TokenBuilder(self.tokenizer, self.token_risk)

    @cached_property
    def scorer(self) -> AnswerScorer:
        """The scorer of answers."""
        return AnswerScorer(self.risk, self.reference, self.calibration, self.misfit)


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
