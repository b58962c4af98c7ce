"""Formats answers in OpenAI's shape, whole and as chunks of a stream, with their risk; see ``responses``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.front import LMFront
from selfdoubt.serve.openai import logprobs, risks
from selfdoubt.serve.openai.params import GenerationParams


def dump_json(data: Any) -> str:
    """Return JSON in one line; never NaN."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def format_event(data: Any) -> bytes:
    """Return one server-sent event."""
    return f"data: {dump_json(data)}\n\n".encode()


@dataclass(frozen=True)
class ResponseFormatter:
    """Formatter of the answers to one request.

    Args:
        front: Front of the model that answers.
        params: Parameters of the request.
        head: The fields that all replies share: id, created, model, system_fingerprint.
    """

    front: LMFront
    params: GenerationParams
    head: dict[str, Any]

    def format_response(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """Return the reply to a request that does not stream."""
        return {
            **self.head,
            "object": "chat.completion" if self.params.chat else "text_completion",
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": count_usage(prompt_tokens, answers),
        }

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        hidden = self.is_hidden(answer)
        text = answer.shown if hidden else answer.text
        tokens = () if hidden else answer.tokens
        message = {"role": "assistant", "content": text, "refusal": None}
        choice: dict[str, Any] = {
            "index": index,
            **({"message": message} if self.params.chat else {"text": text}),
            "logprobs": None if hidden else self._logprobs(tokens),
            "finish_reason": answer.finish,
        }
        if self.params.risk:
            choice["risk"] = {
                **risks.format_answer_risk(self.front, answer),
                "withheld": hidden,
                "tokens": [risks.format_token_risk(self.front, token) for token in tokens],
            }
        return choice

    def is_hidden(self, answer: Answer) -> bool:
        """Return whether an answer is replaced, because the model abstains from it and the request asks for that."""
        return self.params.hide_abstained and answer.abstained

    def format_start(
        self, index: int, question: Sequence[Token], p_answerable: float | None
    ) -> Iterator[dict[str, Any]]:
        """Yield the chunk before an answer's first token: the role, the question's risk and p_answerable."""
        start = {"question": risks.format_question_risk(self.front, question), "p_answerable": p_answerable}
        if self.params.chat:
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, start)
        elif self.params.risk:
            yield self._chunk(index, "", start)

    def format_tokens(self, index: int, tokens: Sequence[Token], offset: int) -> Iterator[dict[str, Any]]:
        """Yield one chunk per token; ``offset`` is the length of the text before them."""
        for token in tokens:
            risk = risks.format_token_risk(self.front, token) if self.params.risk else None
            delta = {"content": token.text} if self.params.chat else token.text
            yield self._chunk(index, delta, risk, self._logprobs((token,), offset))
            offset += len(token.text)

    def format_end(self, index: int, answer: Answer, sent: str) -> Iterator[dict[str, Any]]:
        """Yield the text that was not sent yet, the reason of the end, and the risk of the whole."""
        hidden = self.is_hidden(answer)
        text = answer.shown if hidden else answer.text
        rest = text[len(sent) :]
        if rest:
            yield self._chunk(index, {"content": rest} if self.params.chat else rest, None)
        risk = {**risks.format_answer_risk(self.front, answer), "withheld": hidden} if self.params.risk else None
        yield self._chunk(index, {} if self.params.chat else "", risk, finish=answer.finish)

    def format_usage(self, prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the last chunk, for requests that ask for it: the numbers of tokens."""
        return {**self._stem(), "choices": [], "usage": count_usage(prompt_tokens, answers)}

    def _chunk(
        self, index: int, delta: Any, risk: Any, probs: Any = None, *, finish: str | None = None
    ) -> dict[str, Any]:
        body = {"delta": delta} if self.params.chat else {"text": delta}
        choice = {"index": index, **body, "logprobs": probs, "finish_reason": finish}
        if self.params.risk and risk is not None:
            choice["risk"] = risk
        return {**self._stem(), "choices": [choice], **({"usage": None} if self.params.include_usage else {})}

    def _stem(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if self.params.chat else "text_completion"}

    def _logprobs(self, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any] | None:
        if not self.params.logprobs:
            return None
        tokenizer, top = self.front.tokenizer, self.params.sampling.alternatives
        if not self.params.chat:
            return logprobs.format_completion_logprobs(tokenizer, list(tokens), top, offset)
        return {
            "content": [logprobs.format_chat_logprobs(tokenizer, token, top) for token in tokens],
            "refusal": None,
        }


def count_usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, int]:
    """Return the numbers of tokens that were read and written."""
    written = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
