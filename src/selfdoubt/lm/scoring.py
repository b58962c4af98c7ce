"""Scores existing text, teacher-forced, several texts in one batch."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfdoubt.errors import PromptError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.conditions import Made, Origin
from selfdoubt.lm.front import ModelWithFront
from selfdoubt.lm.generation import find_last_user_token, find_unscored_tokens
from selfdoubt.lm.hidden_states import AnswerStates, HiddenStatePooler
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.prefill import prefill_in_chunks, run_to_end, teacher_force_in_chunks
from selfdoubt.lm.probes import build_stepper
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.text.prompt import Prompt, encode, encode_pair, strip_answer
from selfdoubt.lm.text.prompt_form import TEXT


class TeacherForcedText(NamedTuple):
    """A text to score."""

    text: str
    ids: list[int]  #: token ids of the text
    prompt: Prompt | None  #: prompt that it answers; None where it answers nothing


def encode_teacher_forced(
    tokenizer: Any, pairs: Sequence[tuple[PromptLike | None, str]], *, raw: bool
) -> list[TeacherForcedText]:
    """Return the token ids of texts and of the prompts that they answer.

    Raises:
        PromptError: If a text or a question is empty.
    """
    texts = []
    for question, text in pairs:
        if question is None:
            bare = _strip(text, joined=True)
            texts.append(TeacherForcedText(bare, encode(tokenizer, bare, raw=True).ids, None))
        else:
            bare = _strip(text, joined=raw)
            prompt, ids = encode_pair(tokenizer, question, bare, raw=raw)
            texts.append(TeacherForcedText(bare, ids, prompt))
    return texts


def score_teacher_forced(
    lm: ModelWithFront,
    pairs: Sequence[tuple[PromptLike | None, str]],
    *,
    raw: bool,
    alternatives: int,
    made: Made = "given",
) -> list[Answer]:
    """Score texts as ``RiskAwareLM.score_batch`` does; ``made`` is the way in which they were made."""
    texts = encode_teacher_forced(lm.front.tokenizer, pairs, raw=raw)
    return run_to_end(score_in_chunks(lm, texts, alternatives, made=made))


def score_in_chunks(
    lm: ModelWithFront,
    texts: Sequence[TeacherForcedText],
    alternatives: int,
    sizer: ChunkSizer | None = None,
    made: Made = "given",
) -> Generator[None, None, list[Answer]]:
    """Score texts side by side, piece by piece. A prompt that comes several times is read once.

    Args:
        lm: The model.
        texts: Texts to score, from ``encode_teacher_forced``.
        alternatives: Number of the most probable tokens that come with each token.
        sizer: Sizer of the pieces; None reads as much at once as memory for the logits allows.
        made: The way in which the texts were made.

    Yields:
        Nothing, after each piece.

    Returns:
        An answer per text, in their order.

    Raises:
        PromptError: If a text is too long.
    """
    scored: dict[int, Answer] = {}
    alone = [i for i, text in enumerate(texts) if text.prompt is None]
    if alone:
        answers = yield from _score_texts(lm, [texts[i] for i in alone], alternatives, sizer)
        scored |= zip(alone, answers, strict=True)
    prompted = [i for i, text in enumerate(texts) if text.prompt is not None]
    if prompted:
        if alone:
            yield
        answers = yield from _score_answers(lm, [texts[i] for i in prompted], alternatives, sizer, made)
        scored |= zip(prompted, answers, strict=True)
    return [scored[i] for i in range(len(texts))]


def _score_texts(
    lm: ModelWithFront, texts: Sequence[TeacherForcedText], alternatives: int, sizer: ChunkSizer | None
) -> Generator[None, None, list[Answer]]:
    """Score texts that answer nothing."""
    front = lm.front
    ids = [text.ids for text in texts]
    lengths = [len(i) for i in ids]
    pool = HiddenStatePooler([[(n - 1, n)] for n in lengths], lengths) if front.layers else None
    stepper = HFStepper(lm.model, front.layers, sizer, start="prompt")  # the text is all there is
    scored, _ = yield from prefill_in_chunks(stepper, ids, alternatives, pool)
    answers = []
    for row, text in enumerate(texts):
        end = None if pool is None or pool.means is None else pool.means[row, 0].cpu()
        states = None if end is None else AnswerStates(front.layers, end, end, end)  # without a question, but its end
        start = 1 if text.ids[:1] == [front.tokenizer.bos_token_id] else 0
        tokens = yield from front.tokens.build_in_chunks(scored[row][start:], text.ids[start:])
        origin = Origin("given", TEXT)
        answers.append(front.scorer.score(tokens, [], "given", text.text, states, origin=origin))
    return answers


def _score_answers(
    lm: ModelWithFront, texts: Sequence[TeacherForcedText], alternatives: int, sizer: ChunkSizer | None, made: Made
) -> Generator[None, None, list[Answer]]:
    """Score texts that answer prompts."""
    front = lm.front
    encoded = [text.prompt for text in texts if text.prompt is not None]
    prompts = {tuple(prompt.ids): prompt for prompt in encoded}
    place = {ids: row for row, ids in enumerate(prompts)}
    rows = [place[tuple(prompt.ids)] for prompt in encoded]
    lengths = [len(ids) for ids in prompts]
    ids = [text.ids for text in texts]
    asked = HiddenStatePooler([[find_last_user_token(p)] for p in prompts.values()], lengths) if front.layers else None
    rest = HiddenStatePooler([[(0, len(i) - 1)] for i in ids], [len(i) for i in ids], "right") if front.layers else None
    stepper = build_stepper(lm, sizer)
    # A calibration also compares the text's end with the model's own; nothing else needs the end.
    longest = max(len(prompt.ids) + len(i) for prompt, i in zip(encoded, ids, strict=True))
    room = stepper.context is None or longest <= stepper.context
    ends = front.stop_ids if front.calibration is not None and room else ()
    prefilled, next_logits = yield from prefill_in_chunks(stepper, [list(i) for i in prompts], alternatives, asked)
    questions = []
    for scored_prompt, prompt in zip(prefilled, prompts.values(), strict=True):
        questions.append((yield from front.tokens.build_question_in_chunks(scored_prompt, prompt)))
    yield
    stepper.keep(rows)
    next_logits = next_logits.select(rows)
    kept: list[Tensor] = []
    scored = yield from teacher_force_in_chunks(stepper, next_logits, ids, alternatives, rest, ends, kept)
    attention = torch.cat(kept, 1).numpy() if kept else None
    answers = []
    for i, text in enumerate(texts):
        end_gap = scored[i].pop().gap if ends else 0.0 if room else math.inf
        origin = Origin(made, encoded[i].form, end_gap=end_gap)
        states = None
        if asked is not None and asked.means is not None and next_logits.states is not None:
            first, n = next_logits.states[0, i], len(ids[i])
            others = 0.0 if rest is None or rest.means is None else rest.means[i, 0]
            mean = (first + (n - 1) * others) / n
            states = AnswerStates(front.layers, asked.means[rows[i], 0].cpu(), first.cpu(), mean.cpu())
        tokens = yield from front.tokens.build_in_chunks(scored[i], text.ids, find_unscored_tokens(encoded[i]))
        question = questions[rows[i]]
        weights = None if attention is None else attention[i, : len(text.ids)]
        answers.append(
            front.scorer.score(tokens, question, "given", text.text, states, origin=origin, attention=weights)
        )
    return answers


def _strip(text: str, *, joined: bool) -> str:
    """Return a text without white space around it.

    Raises:
        PromptError: If nothing is left.
    """
    bare = strip_answer(text, joined=joined)
    if not bare.strip():
        raise PromptError("the text to score is empty")
    return bare
