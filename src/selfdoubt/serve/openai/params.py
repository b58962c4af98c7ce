"""What a request comes to: options for the engine, and how its answers are to be told."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfdoubt.errors import ConfigError, PromptError
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.options import Options
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.lm.text.prompt_form import text_form
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.http.settings import Settings
from selfdoubt.serve.openai.errors import RequestError
from selfdoubt.serve.openai.requests import ChatRequest, Common, CompletionRequest, Message

#: Most tokens of a completion that names no number, by OpenAI's definition.
COMPLETION_TOKENS = 16
#: What stands for top_p 0, which OpenAI allows: the most probable token alone.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Plan:
    """What is wanted.

    Args:
        questions: One or more, each answered ``n`` times.
        options: For the engine.
        n: Answers to each question.
        alternatives: Most probable tokens to tell with each token.
        logprobs: Whether log-probabilities are told.
        stream: Whether tokens are sent as they come.
        usage: Whether a stream ends with the number of tokens.
        risk: Whether risks are told.
        withhold: Whether an answer that the calibration abstains from is replaced.
        timeout: Seconds.
    """

    questions: Sequence[list[dict[str, str]] | str | Prompt]
    options: Options
    n: int
    alternatives: int
    logprobs: bool
    stream: bool
    usage: bool
    risk: bool
    withhold: bool
    timeout: float


def plan(request: ChatRequest | CompletionRequest, settings: Settings, limits: Limits, front: LMFront) -> Plan:
    """Read a request.

    Raises:
        RequestError: If the model is not this one, or the risk is asked of a server that tells none.
        ConfigError: If options contradict each other or the limits.
        PromptError: If the question is beyond the limits.
    """
    check_model(request.model, settings)
    chat = isinstance(request, ChatRequest)
    if isinstance(request, ChatRequest):
        alternatives, logprobs = request.top_logprobs or 0, bool(request.logprobs)
        if request.top_logprobs is not None and not logprobs:
            raise ConfigError("top_logprobs needs logprobs: true")
        questions: Any = [chat_of(request.messages, limits)]
    else:
        alternatives, logprobs = request.logprobs or 0, request.logprobs is not None
        if request.best_of not in (None, request.n or 1):
            raise ConfigError("best_of is not supported other than n; ask for n answers and take the least risky")
        most = min(limits.prompts, limits.queue)
        if len(request.prompts) > most:
            raise ConfigError(f"a request may have {most} prompts at most here, got {len(request.prompts)}")
        questions = [p if isinstance(p, str) else _prompt_of(front, p, limits) for p in request.prompts]
    if request.stream_options is not None and not request.stream:
        raise ConfigError("stream_options needs stream: true")
    options: Options = {
        "temperature": settings.temperature if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p or _SMALLEST,
        "max_tokens": _most_tokens(request, settings, limits),
        "seed": secrets.randbelow(2**31) if request.seed is None else request.seed,
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop or [],
        "raw": not chat,
    }
    return Plan(
        questions,
        options,
        request.n or 1,
        alternatives,
        logprobs,
        bool(request.stream),
        bool(request.stream_options and request.stream_options.include_usage),
        _risk(request, settings),
        _withhold(request, settings, front),
        min(request.timeout or limits.timeout, limits.timeout),
    )


def chat_of(messages: Sequence[Message], limits: Limits) -> list[dict[str, str]]:
    """Messages for the chat template.

    Raises:
        PromptError: If there are too many, or one has too many parts.
    """
    if len(messages) > limits.messages:
        raise PromptError(f"a chat may have {limits.messages} messages at most here, got {len(messages)}; drop some")
    parts = max(1 if isinstance(m.content, str) else len(m.content) for m in messages)
    if parts > limits.parts:
        raise PromptError(f"a message may have {limits.parts} parts at most here, got {parts}; join some")
    return [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]


def check_model(name: str | None, settings: Settings) -> None:
    """Refuse a model that is not here; no name takes the one that is.

    Raises:
        RequestError: If it is not here.
    """
    if name is not None and name != settings.name:
        message = f"The model {name!r} does not exist; this server has {settings.name!r}"
        raise RequestError(404, message, param="model", code="model_not_found")


def _most_tokens(request: Common, settings: Settings, limits: Limits) -> int:
    names = ("max_completion_tokens", "max_tokens")
    given: dict[str, int] = {name: value for name in names if (value := getattr(request, name, None)) is not None}
    if len({*given.values()}) > 1:
        raise ConfigError("max_tokens and max_completion_tokens contradict each other; give one of them")
    default = settings.max_tokens if isinstance(request, ChatRequest) else COMPLETION_TOKENS
    return next(iter(given.values()), min(default, limits.answer_tokens))


def _risk(request: Common, settings: Settings) -> bool:
    if request.risk and not settings.risk:
        raise RequestError(400, "this server tells no risks: it was started with --no-risk", param="risk")
    return settings.risk if request.risk is None else request.risk


def _withhold(request: Common, settings: Settings, front: LMFront) -> bool:
    if request.withhold and not withholds(front):
        raise RequestError(
            400,
            "withhold needs a model whose calibration has a threshold; see `selfdoubt calibrate`",
            param="withhold",
        )
    return settings.withhold if request.withhold is None else request.withhold


def withholds(front: LMFront) -> bool:
    """Whether the model ever abstains."""
    return front.calibration is not None and front.calibration.threshold is not None


def _prompt_of(front: LMFront, ids: list[int], limits: Limits) -> Prompt:
    longest = limits.longest(front.context)
    if len(ids) > longest:
        raise PromptError(f"a prompt must have between 1 and {longest} tokens, got {len(ids)}; shorten it")
    limits.check_ids(ids, front.vocabulary)
    special = set(front.tokenizer.all_special_ids)
    known = len(front.tokenizer)  # a model may have more ids, and sentencepiece decodes none of them
    text = front.tokenizer.decode([i for i in ids if i < known], skip_special_tokens=True)
    return Prompt(ids, [i not in special for i in ids], text_form(text))
