"""The form of a prompt: everything around the last user message, as a short text that can be compared and stored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

#: A question alone in the chat template; a question alone as it is; a text that answers no question.
CHAT, RAW, TEXT = "chat", "raw", "text"
#: Label before a line of a plain prompt: "Q:", "A:", "Passage:".
_LABEL = re.compile(r"\s*([A-Za-z][A-Za-z ]{0,19}:)")


def describe_chat_form(messages: Sequence[Mapping[str, str]]) -> str:
    """Return the form of a chat: ``CHAT`` for a single user message, else a digest of the roles and earlier contents.

    Example:
        >>> describe_chat_form([{"role": "user", "content": "Who?"}])
        'chat'
        >>> system = {"role": "system", "content": "Be brief."}
        >>> a, b = (describe_chat_form([system, {"role": "user", "content": text}]) for text in ("Who?", "Where?"))
        >>> a == b != describe_chat_form([{"role": "user", "content": "Who?"}])
        True
    """
    before = [[m["role"], m["content"].strip()] for m in messages[:-1]]
    return CHAT if not before and messages[-1]["role"] == "user" else _digest(CHAT, [*before, messages[-1]["role"]])


def describe_text_form(text: str) -> str:
    r"""Return the form of a plain prompt: ``RAW`` for a bare text, else a digest of its examples and labels.

    Examples are the text before the last empty line, or before the last line with the first line's label; labels are
    those of the first and the last line, such as "Q:".

    Example:
        >>> describe_text_form("Who was first?")
        'raw'
        >>> describe_text_form("Q: Who?\nA:") == describe_text_form("Q: Where?\nA:")
        True
        >>> describe_text_form("Q: Who?\nA:") == describe_text_form("Q: Why?\nA: So.\n\nQ: Who?\nA:")
        False
    """
    before, _, last = text.strip().rpartition("\n\n")
    lines = last.split("\n")
    labels = [_label(text_line) for text_line in lines]
    if labels[0] and labels[0] in labels[1:]:  # examples without an empty line: the question is the last that begins so
        start = len(labels) - 1 - labels[::-1].index(labels[0])
        before, labels = "\n".join([before, *lines[:start]]), labels[start:]
    labels = [labels[0], labels[-1]]
    return _digest(RAW, [before, *labels]) if before or any(labels) else RAW


def _label(text: str) -> str:
    """Return the label at the beginning of a line, such as "Q:"; empty without one."""
    label = _LABEL.match(text)
    return label.group(1) if label else ""


def _digest(kind: str, values: Sequence[object]) -> str:
    return f"{kind}:{hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]}"
