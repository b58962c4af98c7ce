"""``GenerationParams``: turns OpenAI's fields into parameters, and those into requests for the engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from selfdoubt.errors import ConfigError, PromptError
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.text.prompt import Prompt, encode
from selfdoubt.lm.text.prompt_form import describe_text_form
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import GenerationRequest, list_seeds
from selfdoubt.serve.http.settings import ServerSettings
from selfdoubt.serve.openai.errors import RequestError
from selfdoubt.serve.openai.requests import ChatMessageInput, ChatRequest, CompletionRequest, GenerationBody

#: Most tokens of a completion that names no number, by OpenAI's definition.
DEFAULT_COMPLETION_TOKENS = 16
#: The top_p that stands for 0, which OpenAI allows: the most probable token alone.
_SMALLEST = 1e-12
#: A chat's messages, a text, or token ids.
PromptInput = list[dict[str, str]] | str | list[int]


@dataclass(frozen=True)
class GenerationParams:
    """Parameters of a request for answers.

    Args:
        prompts: One or more prompts; each is answered once per seed.
        sampling: Settings by which tokens are chosen, with the number of alternatives per token.
        seeds: One seed per answer to a prompt.
        stops: Texts that end an answer.
        timeout: Seconds that the request may take, waiting included.
        chat: Prompts go through the chat template, and replies have the shape of chats; else of completions.
        logprobs: Send log-probabilities.
        stream: Send tokens as they come.
        include_usage: End a stream with the numbers of tokens.
        risk: Send risks.
        hide_abstained: Replace answers that the calibration abstains from.
    """

    prompts: Sequence[PromptInput]
    sampling: Sampling
    seeds: tuple[int, ...]
    stops: tuple[str, ...]
    timeout: float
    chat: bool
    logprobs: bool
    stream: bool
    include_usage: bool
    risk: bool
    hide_abstained: bool

    def build_request(self, front: LMFront, prompt: PromptInput, limits: Limits, client: str) -> GenerationRequest:
        """Encode a prompt, and return the engine's request for answers to it.

        Raises:
            PromptError: If the prompt is empty or too long, or the chat template refuses it.
        """
        return GenerationRequest(
            self._encode(front, prompt, limits), self.sampling, self.seeds, self.stops, client, self.timeout
        )

    def _encode(self, front: LMFront, prompt: PromptInput, limits: Limits) -> Prompt:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return decode_ids(front, prompt)  # type: ignore[arg-type]
        question: list[dict[str, str]] | str = prompt  # type: ignore[assignment]
        limits.check_prompt_size(question, front.context)
        return encode(front.tokenizer, question, raw=not self.chat)


def build_params(
    request: ChatRequest | CompletionRequest, settings: ServerSettings, limits: Limits, front: LMFront
) -> GenerationParams:
    """Return the parameters of a request.

    Raises:
        RequestError: If it names another model, or asks for risks that this server does not send.
        ConfigError: If options contradict each other or the limits.
        PromptError: If the prompt is beyond the limits.
    """
    check_model(request.model, settings)
    prompts: list[PromptInput]
    if isinstance(request, ChatRequest):
        alternatives, logprobs = request.top_logprobs or 0, bool(request.logprobs)
        if request.top_logprobs is not None and not logprobs:
            raise ConfigError("top_logprobs needs logprobs: true")
        prompts = [convert_messages(request.messages, limits)]
    else:
        alternatives, logprobs = request.logprobs or 0, request.logprobs is not None
        if request.best_of not in (None, request.n or 1):
            raise ConfigError("best_of is not supported other than n; ask for n answers and take the least risky")
        most = min(limits.prompts, limits.queue)
        if len(request.prompts) > most:
            raise ConfigError(f"a request may have {most} prompts at most here, got {len(request.prompts)}")
        for prompt in request.prompts:
            if not isinstance(prompt, str):
                _check_ids(front, prompt, limits)
        prompts = [*request.prompts]
    if request.stream_options is not None and not request.stream:
        raise ConfigError("stream_options needs stream: true")
    sampling = Sampling(
        temperature=float(settings.temperature if request.temperature is None else request.temperature),
        top_p=1.0 if request.top_p is None else request.top_p or _SMALLEST,
        max_tokens=_max_tokens(request, settings, limits),
        stop_ids=frozenset(front.stop_ids),
        alternatives=alternatives,
    )
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    return GenerationParams(
        prompts=prompts,
        sampling=sampling,
        seeds=list_seeds(seed, request.n or 1),
        stops=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        timeout=limits.clamp_timeout(request.timeout),
        chat=isinstance(request, ChatRequest),
        logprobs=logprobs,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        risk=_sends_risk(request, settings),
        hide_abstained=_hides_abstained(request, settings, front),
    )


def convert_messages(messages: Sequence[ChatMessageInput], limits: Limits) -> list[dict[str, str]]:
    """Return messages for the chat template.

    Raises:
        PromptError: If there are too many, or one has too many parts.
    """
    if len(messages) > limits.messages:
        raise PromptError(f"a chat may have {limits.messages} messages at most here, got {len(messages)}; drop some")
    most = max(1 if isinstance(m.content, str) else len(m.content) for m in messages)
    if most > limits.message_parts:
        raise PromptError(f"a message may have {limits.message_parts} parts at most here, got {most}; join some")
    return [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]


def check_model(name: str | None, settings: ServerSettings) -> None:
    """Check that a request names the model of this server, or none.

    Raises:
        RequestError: If it names another model.
    """
    if name is not None and name != settings.name:
        message = f"The model {name!r} does not exist; this server has {settings.name!r}"
        raise RequestError(404, message, param="model", code="model_not_found")


def _max_tokens(request: GenerationBody, settings: ServerSettings, limits: Limits) -> int:
    names = ("max_completion_tokens", "max_tokens")
    given: dict[str, int] = {name: value for name in names if (value := getattr(request, name, None)) is not None}
    if len({*given.values()}) > 1:
        raise ConfigError("max_tokens and max_completion_tokens contradict each other; give one of them")
    default = settings.max_tokens if isinstance(request, ChatRequest) else DEFAULT_COMPLETION_TOKENS
    return next(iter(given.values()), min(default, limits.answer_tokens))


def _sends_risk(request: GenerationBody, settings: ServerSettings) -> bool:
    if request.risk and not settings.risk:
        message = "Risk scores are disabled on this server: it was started with --no-risk; leave risk out"
        raise RequestError(400, message, param="risk")
    return settings.risk if request.risk is None else request.risk


def _hides_abstained(request: GenerationBody, settings: ServerSettings, front: LMFront) -> bool:
    if request.withhold and not can_abstain(front):
        raise RequestError(
            400,
            "withhold needs a model whose calibration has a threshold; see `selfdoubt calibrate`",
            param="withhold",
        )
    return settings.hide_abstained if request.withhold is None else request.withhold


def can_abstain(front: LMFront) -> bool:
    """Return whether the model has a threshold below which it abstains."""
    return front.calibration is not None and front.calibration.threshold is not None


def _check_ids(front: LMFront, ids: list[int], limits: Limits) -> None:
    longest = limits.max_prompt_tokens(front.context)
    if len(ids) > longest:
        raise PromptError(f"a prompt must have between 1 and {longest} tokens, got {len(ids)}; shorten it")
    limits.check_ids(ids, front.vocabulary)


def decode_ids(front: LMFront, ids: list[int]) -> Prompt:
    """Return ready-made token ids as a prompt: all of them but control tokens are the user's own."""
    special = set(front.tokenizer.all_special_ids)
    known = len(front.tokenizer)  # a model may have more ids, and sentencepiece decodes none of them
    text = front.tokenizer.decode([i for i in ids if i < known], skip_special_tokens=True)
    return Prompt(ids, [i not in special for i in ids], describe_text_form(text))
