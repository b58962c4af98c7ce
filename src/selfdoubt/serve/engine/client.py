"""``EngineClient``: the interface through which servers, pages and Python callers send requests to an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol, Unpack, runtime_checkable

from selfdoubt.lm import defaults
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.options import Options
from selfdoubt.lm.scoring import TeacherForcedText
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import GenerationRequest, RequestHandle
from selfdoubt.serve.engine.stats import EngineStats


@runtime_checkable
class EngineClient(Protocol):
    """An ``Engine``, or ``Replicas`` of one; ``Engine`` explains the methods."""

    limits: Limits
    stats: EngineStats
    failure: BaseException | None

    @property
    def front(self) -> LMFront:
        """Everything about the model except its weights."""

    @property
    def ready(self) -> bool:
        """True if a request would be accepted, unless the queue is full."""

    @property
    def running(self) -> int:
        """Number of answers in progress."""

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""

    def generate(
        self,
        prompt: PromptLike | Prompt,
        *,
        n: int = 1,
        alternatives: int = defaults.ALTERNATIVES,
        client: str = "",
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> RequestHandle:
        """Encode a prompt and submit a request for answers to it."""

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Submit a request."""

    def call(self, work: Callable[[RiskAwareLM], Any]) -> Future[Any]:
        """Run other work with the model."""

    def score(self, texts: Sequence[TeacherForcedText]) -> Future[list[Answer]]:
        """Score texts."""

    def hold_open(self) -> AbstractContextManager[None]:
        """Accept texts to score within a block, also while the engine is closing."""

    def check_capacity(self) -> None:
        """Refuse a request that would be refused anyway, before its prompt is encoded."""

    def close(self, patience: float = 30.0) -> None:
        """Finish the requests that were accepted, and end."""
