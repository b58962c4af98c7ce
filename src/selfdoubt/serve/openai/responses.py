"""Bodies of replies, for the OpenAPI schema; ``format`` makes plain data of these shapes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

P_ANSWERABLE = (
    "Probability, from the question alone, that the model's own answer is right; null without a calibration of it, or "
    "where it does not hold."
)
P_CORRECT_NOTE = "One line: why a calibrated model has no p_correct for this answer, or a caveat; null otherwise."


class StrictReply(BaseModel):
    """An object with these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(StrictReply):
    """The description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(StrictReply):
    """An error, in OpenAI's shape."""

    error: ErrorDetail


class TokenRisk(StrictReply):
    """The doubt about one token, entropies in nats."""

    text: str
    risk: float
    total: float
    epistemic: float
    aleatoric: float
    divergence: float | None = Field(description="mean KL(base || member); null unless the base answers for members")
    margin: float | None = Field(description="1 - (largest - second largest probability); null in a question")
    self_certainty: float | None = Field(description="-KL(uniform || distribution); null in a question")
    layer_disagreement: float | None = Field(description="divergence of late layers' distributions; null in a question")
    density: float | None = Field(description="Mahalanobis distance of the features; null without their statistics")
    percentile: float | None


class QuestionRisk(StrictReply):
    """The doubt about the question's own words."""

    risk: float
    risk_name: str
    percentile: float | None


class StartRisk(StrictReply):
    """The doubt that is known before an answer begins."""

    question: QuestionRisk | None
    p_answerable: float | None = Field(description=P_ANSWERABLE)


class EndRisk(StartRisk):
    """The doubt about an answer whose tokens were sent already."""

    risk: float
    risk_name: str
    percentile: float | None
    p_correct: float | None
    p_correct_note: str | None = Field(description=P_CORRECT_NOTE)
    abstain: bool | None
    withheld: bool


class AnswerRisk(EndRisk):
    """The doubt about an answer."""

    tokens: list[TokenRisk]


class Usage(StrictReply):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AlternativeLogprob(StrictReply):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(AlternativeLogprob):
    """A chosen token and the most probable ones in its place."""

    top_logprobs: list[AlternativeLogprob]


class ChatLogprobs(StrictReply):
    """Log-probabilities of a chat."""

    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(StrictReply):
    """Log-probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class Reply(StrictReply):
    """The fields that all replies to a request for answers share."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatMessage(StrictReply):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(StrictReply):
    """One of the answers. Without ``risk`` if the request or the server turns it off."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    risk: AnswerRisk = None  # type: ignore[assignment]


class ChatCompletion(Reply):
    """A chat's answers."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Delta(StrictReply):
    """A piece of an answer; the last is empty."""

    role: Literal["assistant"] = None  # type: ignore[assignment]
    content: str = None  # type: ignore[assignment]
    refusal: None = None


class ChatChunkChoice(StrictReply):
    """A piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    risk: StartRisk | TokenRisk | EndRisk = None  # type: ignore[assignment]


class ChatChunk(Reply):
    """An event of a chat's stream: one token, except the first and the last."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(StrictReply):
    """One of the answers. Without ``risk`` if the request or the server turns it off."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    risk: AnswerRisk = None  # type: ignore[assignment]


class Completion(Reply):
    """Continued texts."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(StrictReply):
    """A piece of one of the answers."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    risk: StartRisk | TokenRisk | EndRisk = None  # type: ignore[assignment]


class TextChunk(Reply):
    """An event of a completion's stream."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class TextScore(StrictReply):
    """The doubt about a text that existed already."""

    object: Literal["score"]
    index: int
    risk: float
    risk_name: str
    percentile: float | None
    p_correct: float | None
    p_correct_note: str | None = Field(description=P_CORRECT_NOTE)
    abstain: bool | None
    p_answerable: float | None = Field(description=P_ANSWERABLE)
    scores: dict[str, float]
    tokens: list[TokenRisk]
    question: QuestionRisk | None
    question_tokens: list[TokenRisk]


class ScoreList(StrictReply):
    """One score per text, in their order."""

    object: Literal["list"]
    model: str
    data: list[TextScore]


class ModelInfo(BaseModel):
    """A model that this server runs."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    risk: dict[str, Any] = None  # type: ignore[assignment]


class ModelList(StrictReply):
    """The models that this server runs: one."""

    object: Literal["list"]
    data: list[ModelInfo]


class Status(StrictReply):
    """The state of a server that works."""

    status: Literal["ok", "ready"]
