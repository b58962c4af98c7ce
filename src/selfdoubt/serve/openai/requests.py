"""Bodies of requests, as OpenAI defines them. A field that is not supported is refused by its schema, never ignored.

They are pydantic models: this file is imported when a server starts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
EmptyList = Annotated[list[Any], Field(max_length=0)]
NON_EMPTY = Field(min_length=1, fail_fast=True)  # the first item that is wrong ends the check of a list
Zero = Annotated[float, Field(ge=0, le=0)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], NON_EMPTY]
Stop = Annotated[str, Field(min_length=1)]


class StrictModel(BaseModel):
    """An object that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(StrictModel):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class ChatMessageInput(StrictModel):
    """A turn of a chat. Parts of a content are lines of one text; ``developer`` is another word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], NON_EMPTY]
    # Fields of OpenAI's own answers, so that they can be sent back.
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: EmptyList | None = None
    annotations: EmptyList | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(StrictModel):
    """The only response format."""

    type: Literal["text"]


class GenerationBody(StrictModel):
    """Fields that chats and completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Fields of this server.
    risk: Annotated[bool | None, Field(description="False leaves out the risk, for clients that refuse it.")] = None
    withhold: Annotated[
        bool | None, Field(description="Say that the model is not sure where its calibration abstains.")
    ] = None
    timeout: Annotated[float, Field(ge=1, description="Seconds, waiting included.")] | None = None
    # Without an effect on the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    # Not supported by this server.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class ChatRequest(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessageInput], NON_EMPTY]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    parallel_tool_calls: bool | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None


class CompletionRequest(GenerationBody):
    """``POST /v1/completions``: continues texts as they are, without the chat template."""

    prompt: (
        str
        | Annotated[list[str], NON_EMPTY]
        | Ids
        | Annotated[list[Ids], NON_EMPTY]
    )  # fmt: skip
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Count | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One item per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return [*self.prompt]


class ScoreItem(StrictModel):
    """A text, and the question or the chat that it answers, if any."""

    text: str
    question: str | None = None
    messages: Annotated[list[ChatMessageInput], NON_EMPTY] | None = None


class ScoreRequest(StrictModel):
    """``POST /v1/score``: the risk of texts that exist already."""

    model: str | None = None
    input: ScoreItem | Annotated[list[ScoreItem], NON_EMPTY]
    raw: bool | None = None
    timeout: Annotated[float, Field(ge=1)] | None = None


#: Messages for fields whose schema explains itself badly.
ADVICE = {
    "prompt": "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; none empty",
    "stop": "stop must be a text or up to 4 texts, none empty",
    "content": "the content of a message must be a text or a list of parts {'type': 'text', 'text': ...}",
    "name": "names of participants are not supported; write them into the content",
    "tools": "tools are not supported; leave tools out",
    "functions": "functions are not supported; leave functions out",
    "tool_choice": "tools are not supported; leave tool_choice out",
    "function_call": "functions are not supported; leave function_call out",
    "tool_calls": "tools are not supported; leave tool_calls out",
    "response_format": 'only response_format {"type": "text"} is supported',
    "frequency_penalty": "frequency_penalty is not supported other than 0",
    "presence_penalty": "presence_penalty is not supported other than 0",
    "logit_bias": "logit_bias is not supported; leave it out",
    "modalities": 'modalities other than ["text"] are not supported',
    "reasoning_effort": "reasoning_effort is not supported; leave it out",
    "verbosity": "verbosity is not supported; leave it out",
    "audio": "audio is not supported; leave it out",
    "moderation": "moderation is not supported; leave it out",
    "prediction": "prediction is not supported; leave it out",
    "web_search_options": "web_search_options is not supported; leave it out",
    "echo": "echo is not supported; use /v1/score for the risk of a text that exists already",
    "suffix": "suffix is not supported; leave it out",
}


def describe_validation_error(errors: Any) -> tuple[str, str | None]:
    """Return pydantic's first error as one line for people, and the name of the field that is wrong."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    field = str(place[0]) if place else None
    if first["type"] == "extra_forbidden":
        return f"Unrecognized request argument supplied: {path}", field
    if first["type"] == "missing":
        return f"you must provide {path or 'a body'}", field
    for part in reversed(place):
        if part in ADVICE:
            return ADVICE[str(part)], field
    return f"{path or 'the body'}: {first['msg']}", field
