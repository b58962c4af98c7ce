"""How much a server takes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfdoubt.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on.

    Args:
        batch: Most sequences that are decoded side by side (an answer is one, whatever the members).
        batch_tokens: Most tokens, of prompts and answers and the padding between, that the cache may hold for them.
        queue: Most requests that wait.
        prompt_tokens: Longest prompt; None takes what the model's context leaves.
        answer_tokens: Longest answer that may be asked for.
        choices: Most answers to one request.
        timeout: Seconds that a request may take, waiting included, where it does not ask for less.

    Raises:
        ConfigError: If a limit is out of range.
    """

    batch: int = 32
    batch_tokens: int = 65_536
    queue: int = 128
    prompt_tokens: int | None = None
    answer_tokens: int = 4096
    choices: int = 16
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name in ("batch", "batch_tokens", "queue", "prompt_tokens", "answer_tokens", "choices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ConfigError(f"timeout must be a number of seconds above 0, got {self.timeout}")
