"""Where requests are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, Unpack, runtime_checkable

from selfdoubt.lm.answer import Answer
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.options import Options
from selfdoubt.lm.scoring import TeacherForcedText
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import Job
from selfdoubt.serve.engine.stats import Meter


@runtime_checkable
class Desk(Protocol):
    """An ``Engine``, or ``Replicas`` of one; the methods are explained there."""

    limits: Limits
    meter: Meter
    failure: BaseException | None

    @property
    def front(self) -> LMFront:
        """All that is known of the model but its weights."""

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, but for a full queue."""

    @property
    def running(self) -> int:
        """Answers on their way."""

    @property
    def waiting(self) -> int:
        """Requests that wait."""

    def ask(
        self,
        question: PromptLike | Prompt,
        *,
        n: int = 1,
        alternatives: int = 5,
        client: str = "",
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """Ask for answers."""

    def call(self, work: Callable[[RiskAwareLM], Any]) -> Future[Any]:
        """Do something else with the model."""

    def score(self, given: Sequence[TeacherForcedText]) -> Future[list[Answer]]:
        """Score texts."""

    def check_room(self) -> None:
        """Refuse what would be refused anyway, before its question is encoded."""

    def close(self, patience: float = 30.0) -> None:
        """Finish what was taken, and end."""
