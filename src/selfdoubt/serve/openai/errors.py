"""Errors in OpenAI's shape: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from selfdoubt.errors import BusyError, ConfigError, DeadlineError, EngineError, NonFiniteError, PromptError

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
#: Most characters of an error's message, and of the name of a field in it: they may repeat what was sent.
MAX_MESSAGE, MAX_FIELD = 400, 100


def shorten(text: str, most: int = MAX_MESSAGE) -> str:
    """Return a text in one line of at most ``most`` characters.

    The excess is cut from the middle: the beginning says what was expected, and the end how to repair it.
    """
    if len(text) > 8 * most:
        text = text[: 4 * most] + text[-4 * most :]
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 5]} ... {text[-end:]}"


class RequestError(Exception):
    """An error that ends a request with an HTTP status and a body in OpenAI's shape.

    Args:
        status: HTTP status.
        message: One line for a person; a long one is shortened.
        kind: OpenAI's ``type``.
        param: The field of the request that is wrong.
        code: A word for programs.
        headers: Further headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID_REQUEST,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = shorten(message)
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param = None if param is None else shorten(param, MAX_FIELD)
        self.code, self.headers = code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the reply."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ClientDisconnectedError(Exception):
    """The error for a client that has hung up, and reads nothing more."""


def to_request_error(error: BaseException) -> RequestError:
    """Return the error that a client gets; an unexpected one reveals nothing of the inside."""
    match error:
        case RequestError():
            return error
        case BusyError():
            wait = str(max(1, math.ceil(error.retry_after)))
            return RequestError(429, str(error), "rate_limit_error", code="queue_full", headers={"Retry-After": wait})
        case DeadlineError():
            return RequestError(504, str(error), "timeout_error", code="deadline_exceeded")
        case EngineError():
            return RequestError(503, str(error), SERVER_ERROR, code="engine_unavailable")
        case PromptError():
            return RequestError(400, str(error), code="invalid_prompt")
        case ConfigError():
            return RequestError(400, str(error), code="invalid_value")
        case NonFiniteError():
            return RequestError(500, str(error), SERVER_ERROR, code="non_finite")
    return RequestError(
        500, "something went wrong inside the server; its log says what", SERVER_ERROR, code="internal_error"
    )
