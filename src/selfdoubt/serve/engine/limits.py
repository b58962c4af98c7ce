"""How much a server takes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfdoubt.errors import ConfigError, PromptError
from selfdoubt.lm.text.prompt import Prompt

if TYPE_CHECKING:  # the command line reads these defaults before anything heavy is imported
    from selfdoubt.lm.inputs import PromptLike
    from selfdoubt.lm.scoring import TeacherForcedText
    from selfdoubt.serve.engine.request import Ask

#: Characters that a prompt may have for each token that it may have. Tokens rarely have ten; long runs of spaces do.
CHARACTERS = 64


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
        stops: Most stop texts of a request.
        stop_characters: Longest stop text.
        messages: Most messages of a chat.
        parts: Most parts of a message's content.
        prompts: Most prompts of one completion request.
        texts: Most texts of one request to score.

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
    stops: int = 4
    stop_characters: int = 256
    messages: int = 2048
    parts: int = 256
    prompts: int = 128
    texts: int = 1024

    def __post_init__(self) -> None:
        for name in ("batch", "batch_tokens", "queue", "prompt_tokens", "answer_tokens", "choices", "stops",
                     "stop_characters", "messages", "parts", "prompts", "texts"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ConfigError(f"timeout must be a number of seconds above 0, got {self.timeout}")

    def longest(self, context: int | None) -> int:
        """Return the most tokens of a prompt, for a model of this context."""
        return min(self.prompt_tokens or 2**62, (context or 2**62) - 1)

    def check(self, question: PromptLike | Prompt, context: int | None) -> None:
        """Refuse what cannot fit before time is spent on turning it into tokens.

        Raises:
            PromptError: If a chat has too many messages, or its text too many characters.
        """
        if isinstance(question, Prompt):
            return
        messages = [question] if isinstance(question, str) else [str(m.get("content") or "") for m in question]
        if len(messages) > self.messages:
            raise PromptError(f"a chat may have {self.messages} messages at most here, got {len(messages)}; drop some")
        most, length = CHARACTERS * min(self.longest(context), self.batch_tokens), sum(map(len, messages))
        if length > most:
            raise PromptError(f"a prompt may have {most} characters at most here, got {length}; shorten it")

    @staticmethod
    def check_ids(ids: Sequence[int], vocabulary: int) -> None:
        """Refuse ids that the vocabulary does not have.

        Raises:
            PromptError: If there is one.
        """
        strange = [i for i in ids if not 0 <= i < vocabulary]
        if strange:
            raise PromptError(f"token ids go from 0 to {vocabulary - 1}, got {strange[0]}")

    def check_given(self, given: Sequence[TeacherForcedText], context: int | None) -> int:
        """Refuse texts to score that are too long; return the number of tokens of all.

        Raises:
            PromptError: If a text, or what it answers, has too many tokens.
        """
        total = 0
        for item in given:
            asked = 0 if item.prompt is None else len(item.prompt.ids)
            most = self.prompt_tokens or 2**62
            if max(asked, len(item.ids)) > most:
                raise PromptError(f"a text to score has more than {most} tokens; shorten it, or score it in parts")
            own = asked + len(item.ids)
            if context is not None and own > context:
                raise PromptError(
                    f"a text to score and its question have {own} tokens, and the model reads {context} at most; "
                    "shorten them"
                )
            total += own
        return total

    def checked(self, ask: Ask, context: int | None, vocabulary: int) -> Ask:
        """The request with its timeout, if it is within these limits and the model's.

        Raises:
            PromptError: If the prompt is empty or too long, or an id is not the vocabulary's.
            ConfigError: If it wants too many or too long answers, or has too many or too long stop texts.
        """
        length, answer, n = len(ask.prompt.ids), ask.sampling.max_tokens, len(ask.seeds)
        most = min(self.choices, self.batch)
        if not 1 <= n <= most:
            raise ConfigError(f"n must be between 1 and {most}, got {n}")
        longest = self.longest(context)
        if not 0 < length <= longest:
            raise PromptError(f"a prompt must have between 1 and {longest} tokens, got {length}; shorten it")
        self.check_ids(ask.prompt.ids, vocabulary)
        if answer > self.answer_tokens:
            raise ConfigError(f"max_tokens must be at most {self.answer_tokens} here, got {answer}")
        if n * ask.length(context) > self.batch_tokens:
            raise ConfigError(
                f"{n} answers of up to {answer} tokens to {length} tokens are more than the {self.batch_tokens} "
                "tokens that this server keeps; ask for fewer or shorter ones"
            )
        if len(ask.stops) > self.stops:
            raise ConfigError(f"a request may have {self.stops} stop texts at most here, got {len(ask.stops)}")
        long = max(map(len, ask.stops), default=0)
        if long > self.stop_characters:
            raise ConfigError(f"a stop text may have {self.stop_characters} characters at most here, got {long}")
        return replace(ask, timeout=min(ask.timeout or self.timeout, self.timeout))
