"""Limits on the requests that a server accepts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfdoubt.errors import ConfigError, PromptError
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.setting import setting

if TYPE_CHECKING:  # the command line reads these defaults before anything heavy is imported
    from selfdoubt.lm.inputs import PromptLike
    from selfdoubt.lm.scoring import TeacherForcedText
    from selfdoubt.serve.engine.request import GenerationRequest

#: Characters that a prompt may have per token that it may have. Tokens rarely have ten; long runs of spaces do.
CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Limits:
    """Limits on the requests that an engine accepts.

    Args:
        batch: Most sequences that are decoded side by side (an answer is one, with any number of members).
        batch_tokens: Most tokens, of prompts and answers and the padding between, that the cache may hold for them.
        queue: Most requests that wait.
        prompt_tokens: Most tokens of a prompt; None takes all that the model's context leaves.
        answer_tokens: Longest answer that may be asked for.
        choices: Most answers to one request.
        timeout: Seconds that a request may take, waiting included, unless it asks for less.
        stops: Most stop texts of a request.
        stop_characters: Longest stop text.
        messages: Most messages of a chat.
        message_parts: Most parts of a message's content.
        prompts: Most prompts of one completion request.
        texts: Most texts of one request to score.

    Raises:
        ConfigError: If a limit is out of range.
    """

    batch: int = setting(32, "Most sequences decoded side by side.")
    batch_tokens: int = setting(65_536, "Most tokens in the cache for them.")
    queue: int = setting(128, "Most requests that wait; more are sent away with 429.")
    prompt_tokens: int | None = setting(None, "Longest prompt. [default: the model's context]")
    answer_tokens: int = setting(4096, "Longest answer that may be asked for.")
    choices: int = setting(16, "Most answers to one request.")
    timeout: float = setting(300.0, "Seconds for a request, waiting included.")
    stops: int = 4
    stop_characters: int = 256
    messages: int = 2048
    message_parts: int = 256
    prompts: int = 128
    texts: int = 1024

    def __post_init__(self) -> None:
        for name in ("batch", "batch_tokens", "queue", "prompt_tokens", "answer_tokens", "choices", "stops",
                     "stop_characters", "messages", "message_parts", "prompts", "texts"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ConfigError(f"timeout must be a number of seconds above 0, got {self.timeout}")

    def max_prompt_tokens(self, context: int | None) -> int:
        """Return the largest number of tokens of a prompt, for a model of this context."""
        return min(self.prompt_tokens or 2**62, (context or 2**62) - 1)

    def clamp_timeout(self, seconds: float | None) -> float:
        """Return the seconds that a request may take: those it asks for, within the limit."""
        return min(seconds or self.timeout, self.timeout)

    def check_prompt_size(self, prompt: PromptLike | Prompt, context: int | None) -> None:
        """Check, before a prompt is encoded, that it can fit.

        Raises:
            PromptError: If a chat has too many messages, or its text too many characters.
        """
        if isinstance(prompt, Prompt):
            return
        messages = [prompt] if isinstance(prompt, str) else [str(m.get("content") or "") for m in prompt]
        if len(messages) > self.messages:
            raise PromptError(f"a chat may have {self.messages} messages at most here, got {len(messages)}; drop some")
        most = CHARACTERS_PER_TOKEN * min(self.max_prompt_tokens(context), self.batch_tokens)
        length = sum(map(len, messages))
        if length > most:
            raise PromptError(f"a prompt may have {most} characters at most here, got {length}; shorten it")

    @staticmethod
    def check_ids(ids: Sequence[int], vocabulary: int) -> None:
        """Check that all ids are in the vocabulary.

        Raises:
            PromptError: If an id is not in the vocabulary.
        """
        strange = [i for i in ids if not 0 <= i < vocabulary]
        if strange:
            raise PromptError(f"token ids go from 0 to {vocabulary - 1}, got {strange[0]}")

    def check_scored_texts(self, texts: Sequence[TeacherForcedText], context: int | None) -> int:
        """Check the lengths of texts to score; return the number of tokens of all.

        Raises:
            PromptError: If a text, or its question, has too many tokens.
        """
        total = 0
        for text in texts:
            question = 0 if text.prompt is None else len(text.prompt.ids)
            most = self.prompt_tokens or 2**62
            if max(question, len(text.ids)) > most:
                raise PromptError(f"a text to score has more than {most} tokens; shorten it, or score it in parts")
            length = question + len(text.ids)
            if context is not None and length > context:
                raise PromptError(
                    f"a text to score and its question have {length} tokens, and the model reads {context} at most; "
                    "shorten them"
                )
            total += length
        return total

    def apply(self, request: GenerationRequest, context: int | None, vocabulary: int) -> GenerationRequest:
        """Check a request against these limits and the model's, and return it with its timeout.

        Raises:
            PromptError: If the prompt is empty or too long, or an id is not in the vocabulary.
            ConfigError: If it asks for too many or too long answers, or has too many or too long stop texts.
        """
        length, answer, n = len(request.prompt.ids), request.sampling.max_tokens, len(request.seeds)
        most = min(self.choices, self.batch)
        if not 1 <= n <= most:
            raise ConfigError(f"n must be between 1 and {most}, got {n}")
        longest = self.max_prompt_tokens(context)
        if not 0 < length <= longest:
            raise PromptError(f"a prompt must have between 1 and {longest} tokens, got {length}; shorten it")
        self.check_ids(request.prompt.ids, vocabulary)
        if answer > self.answer_tokens:
            raise ConfigError(f"max_tokens must be at most {self.answer_tokens} here, got {answer}")
        if n * request.max_length(context) > self.batch_tokens:
            raise ConfigError(
                f"{n} answers of up to {answer} tokens to {length} tokens are more than the {self.batch_tokens} "
                "tokens that this server keeps; ask for fewer or shorter ones"
            )
        if len(request.stops) > self.stops:
            raise ConfigError(f"a request may have {self.stops} stop texts at most here, got {len(request.stops)}")
        long = max(map(len, request.stops), default=0)
        if long > self.stop_characters:
            raise ConfigError(f"a stop text may have {self.stop_characters} characters at most here, got {long}")
        return replace(request, timeout=self.clamp_timeout(request.timeout))
