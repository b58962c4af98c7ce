"""Settings of an evaluation as one frozen dataclass; its fields are flags of ``selfdoubt evaluate``."""

from __future__ import annotations

from dataclasses import dataclass

from selfdoubt.data.questions import Question
from selfdoubt.errors import ConfigError
from selfdoubt.eval.prompts import AUTO, BuiltPrompt, Prompting, build_prompt
from selfdoubt.setting import setting


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of how questions are asked, as far as they change the answers.

    Raises:
        ConfigError: If a setting is out of range.
    """

    how: Prompting = AUTO
    shots: tuple[Question, ...] = ()  #: solved examples before each question
    max_tokens: int = setting(64, "Most tokens of an answer.")
    batch_size: int = setting(32, "Questions per batch.")
    samples: int = setting(
        0,
        "Answers to draw for each question, as many as `ask --candidates` draws, next to its most probable one: for "
        "self-consistency and semantic entropy, and to pick the least risky of.",
        flag="--candidates --samples",
        metavar="N",
    )
    temperature: float = setting(1.0, "Temperature of the drawn answers.")
    clusters: str = setting(
        "exact", "Rule by which drawn answers mean the same: exact, f1:SHARE, nli:MODEL, or embed:ENCODER[:COSINE]."
    )
    p_true: bool = setting(False, "Also ask the model whether its answer is true.")
    seed: int = setting(0, "Seed of the subset, the order of choices, shots and drawn answers.")

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("batch_size", 1), ("samples", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.samples == 1:
            raise ConfigError("one sample agrees with nothing; draw at least 2, or 0 for none")
        if self.samples and not self.temperature > 0:
            raise ConfigError(f"the temperature of samples must be above 0, got {self.temperature}")

    @property
    def raw(self) -> bool:
        """True where prompts are plain text, and not a chat."""
        return self.how.style == "qa"

    def prompt(self, question: Question) -> BuiltPrompt:
        """Build the prompt of a question."""
        return build_prompt(question, self.shots, self.how)
