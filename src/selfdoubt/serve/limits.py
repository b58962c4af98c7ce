"""How much a server takes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfdoubt.errors import ConfigError, PromptError

if TYPE_CHECKING:  # the command line reads these defaults before anything heavy is imported
    from selfdoubt.serve.job import Ask


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

    def checked(self, ask: Ask, context: int | None, vocabulary: int) -> Ask:
        """The request with its timeout, if it is within these limits and the model's.

        Raises:
            PromptError: If the prompt is empty or too long, or an id is not the vocabulary's.
            ConfigError: If it wants too many or too long answers.
        """
        length, answer, n = len(ask.prompt.ids), ask.sampling.max_tokens, len(ask.seeds)
        most = min(self.choices, self.batch)
        if not 1 <= n <= most:
            raise ConfigError(f"n must be between 1 and {most}, got {n}")
        longest = min(self.prompt_tokens or 2**62, (context or 2**62) - 1)
        if not 0 < length <= longest:
            raise PromptError(f"a prompt must have between 1 and {longest} tokens, got {length}; shorten it")
        strange = [i for i in ask.prompt.ids if not 0 <= i < vocabulary]
        if strange:
            raise PromptError(f"token ids go from 0 to {vocabulary - 1}, got {strange[0]}")
        if answer > self.answer_tokens:
            raise ConfigError(f"max_tokens must be at most {self.answer_tokens} here, got {answer}")
        if n * ask.length(context) > self.batch_tokens:
            raise ConfigError(
                f"{n} answers of up to {answer} tokens to {length} tokens are more than the {self.batch_tokens} "
                "tokens that this server keeps; ask for fewer or shorter ones"
            )
        return replace(ask, timeout=min(ask.timeout or self.timeout, self.timeout))
