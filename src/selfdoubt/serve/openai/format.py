"""Answers in OpenAI's shape, whole and in pieces, with the risk beside them. Plain data: ``shapes`` describes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.front import LMFront
from selfdoubt.serve.openai import logprobs, risks
from selfdoubt.serve.openai.params import Plan


def dumps(data: Any) -> str:
    """JSON in one line; never NaN."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(data: Any) -> bytes:
    """One server-sent event."""
    return f"data: {dumps(data)}\n\n".encode()


@dataclass(frozen=True)
class Teller:
    """Tells the answers to one request.

    Args:
        front: Of the model that answers.
        plan: What is wanted.
        chat: In the shape of chats, or else of completions.
        head: The fields that all replies share: id, created, model, system_fingerprint.
    """

    front: LMFront
    plan: Plan
    chat: bool
    head: dict[str, Any]

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        return {
            **self.head,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": usage(prompt_tokens, answers),
        }

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        withheld = self.plan.withhold and answer.abstained
        text = answer.shown if withheld else answer.text
        tokens = () if withheld else answer.tokens
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice: dict[str, Any] = {
            "index": index,
            **body,
            "logprobs": None if withheld else self._logprobs(tokens),
            "finish_reason": answer.finish,
        }
        if self.plan.risk:
            choice["risk"] = {
                **risks.of_answer(self.front, answer),
                "withheld": withheld,
                "tokens": [risks.of_token(self.front, token) for token in tokens],
            }
        return choice

    def began(self, index: int, question: Sequence[Token]) -> Iterator[dict[str, Any]]:
        """What a stream says before an answer's first token: who speaks, and the question's risk."""
        if self.chat:
            about = {"question": risks.of_question(self.front, question)}
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, about)
        elif self.plan.risk:
            yield self._chunk(index, "", {"question": risks.of_question(self.front, question)})

    def grew(self, index: int, tokens: Sequence[Token], offset: int) -> Iterator[dict[str, Any]]:
        """One chunk a token; ``offset`` is the length of the text before them."""
        for token in tokens:
            risk = risks.of_token(self.front, token) if self.plan.risk else None
            delta = {"content": token.text} if self.chat else token.text
            yield self._chunk(index, delta, risk, self._logprobs((token,), offset))
            offset += len(token.text)

    def ended(self, index: int, answer: Answer, sent: str) -> Iterator[dict[str, Any]]:
        """What was not sent yet, the reason of the end, and the risk of the whole."""
        withheld = self.plan.withhold and answer.abstained
        text = answer.shown if withheld else answer.text
        rest = text[len(sent) :]
        if rest:
            yield self._chunk(index, {"content": rest} if self.chat else rest, None)
        risk = {**risks.of_answer(self.front, answer), "withheld": withheld} if self.plan.risk else None
        yield self._chunk(index, {} if self.chat else "", risk, finish=answer.finish)

    def total(self, prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last chunk, where it is asked for: how many tokens."""
        return {**self._stem(), "choices": [], "usage": usage(prompt_tokens, answers)}

    def _chunk(
        self, index: int, delta: Any, risk: Any, probs: Any = None, *, finish: str | None = None
    ) -> dict[str, Any]:
        body = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": index, **body, "logprobs": probs, "finish_reason": finish}
        if self.plan.risk and risk is not None:
            choice["risk"] = risk
        return {**self._stem(), "choices": [choice], **({"usage": None} if self.plan.usage else {})}

    def _stem(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _logprobs(self, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any] | None:
        if not self.plan.logprobs:
            return None
        words, top = self.front.tokenizer, self.plan.alternatives
        if not self.chat:
            return logprobs.of_text(words, list(tokens), top, offset)
        return {"content": [logprobs.of_chat(words, token, top) for token in tokens], "refusal": None}


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, int]:
    """How many tokens were read and written."""
    written = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
