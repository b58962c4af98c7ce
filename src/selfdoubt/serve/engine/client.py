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
from selfdoubt.serve.engine.request import GenerationRequest, RequestHandle, build_request
from selfdoubt.serve.engine.stats import EngineStats


@runtime_checkable
class EngineClient(Protocol):
    """An ``Engine``, or ``Replicas`` of one: both inherit ``generate``; ``Engine`` explains the other methods."""

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
        """Encode a prompt and submit a request for ``n`` answers; they come back through the handle.

        Args:
            prompt: A question, a chat, or ready-made token ids.
            n: Number of answers, with the seeds ``seed``, ``seed + 1``, ...
            alternatives: Number of the most probable tokens that come with each token.
            client: Name of the client; clients take turns.
            timeout: Seconds that it may take, waiting included; at most the limit's.
            **options: See ``Options``.

        Raises:
            PromptError: If the prompt is empty or too long.
            ConfigError: If an option is out of range.
            BusyError: If the queue is full.
            EngineError: If the engine has failed or is closing.
        """
        self.limits.check_prompt_size(prompt, self.front.context)
        return self.submit(
            build_request(self.front, prompt, options, n=n, alternatives=alternatives, client=client, timeout=timeout)
        )

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
