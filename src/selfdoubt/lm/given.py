"""Scores text that exists already, teacher-forced, several texts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from selfdoubt.errors import PromptError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.calibration import States
from selfdoubt.lm.decode import read
from selfdoubt.lm.prompt import Detokenizer, Prompt, encode
from selfdoubt.lm.states import StatePool
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.stream import own_end

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


def score_given(
    lm: RiskAwareLM,
    pairs: Sequence[tuple[str | Sequence[Mapping[str, str]] | None, str]],
    *,
    raw: bool,
    alternatives: int,
) -> list[Answer]:
    """See ``RiskAwareLM.score_batch``."""
    prompts, ids = zip(*(_encode(lm.tokenizer, question, text, raw=raw) for question, text in pairs), strict=True)
    pool = None
    if lm.layers:
        pool = StatePool([_spans(p, len(i)) for p, i in zip(prompts, ids, strict=True)], [len(i) for i in ids])
    scored, _ = read(HFStepper(lm.model, lm.layers), ids, alternatives, pool)
    found = []
    for row, (_, text) in enumerate(pairs):
        pieces = Detokenizer(lm.tokenizer)
        own = scored[row][len(prompts[row].ids) :]
        tokens = [lm._token(token, pieces.add(token.id)) for token in own if token is not None]
        states = None if pool is None or pool.means is None else States(lm.layers, *pool.means[row].cpu())
        found.append(lm.answer(tokens, lm._own(scored[row], prompts[row]), "given", text, states))
    return found


def _encode(
    tokenizer: Any, question: str | Sequence[Mapping[str, str]] | None, text: str, *, raw: bool
) -> tuple[Prompt, list[int]]:
    """A prompt, and its ids with those of the text that follows it."""
    if not text.strip():
        raise PromptError("the text to score is empty")
    if question is None:
        return Prompt([], []), encode(tokenizer, text, raw=True).ids
    prompt = encode(tokenizer, question, raw=raw)
    if raw and isinstance(question, str):
        # As one text: where a tokenizer joins words by their neighbours, this is what it has learnt from.
        rest = encode(tokenizer, question + text, raw=True).ids[len(prompt.ids) :]
        if rest:
            return prompt, prompt.ids + rest
    return prompt, prompt.ids + list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _spans(prompt: Prompt, length: int) -> list[tuple[int, int]]:
    """Where ``States`` are taken, in their order; a text without a question has but its end."""
    if not prompt.ids:
        return [(length - 1, length)] * 3
    first = len(prompt.ids) - 1
    return [own_end(prompt), (first, first + 1), (first, length - 1)]
