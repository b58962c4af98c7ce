"""Scores text that exists already, teacher-forced, several texts side by side."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from selfdoubt.errors import PromptError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.conditions import Made, Origin
from selfdoubt.lm.generation import (
    build_question_in_chunks,
    build_tokens_in_chunks,
    find_last_user_token,
    find_unscored_tokens,
)
from selfdoubt.lm.hidden_states import AnswerStates, HiddenStatePooler
from selfdoubt.lm.inputs import Question
from selfdoubt.lm.prefill import prefill_in_chunks, run_to_end, teacher_force_in_chunks
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.text.prompt import Prompt, encode, encode_pair, strip_answer
from selfdoubt.lm.text.prompt_form import TEXT

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


class TeacherForcedText(NamedTuple):
    """A text to score.

    Args:
        text: Its letters.
        ids: Its token ids.
        prompt: What it answers; None where it answers nothing.
    """

    text: str
    ids: list[int]
    prompt: Prompt | None


def encode_teacher_forced(
    tokenizer: Any, pairs: Sequence[tuple[Question | None, str]], *, raw: bool
) -> list[TeacherForcedText]:
    """Return the token ids of texts and of what they answer.

    Raises:
        PromptError: If a text or a question is empty.
    """
    found = []
    for question, text in pairs:
        if question is None:
            bare = _checked(text, joined=True)
            found.append(TeacherForcedText(bare, encode(tokenizer, bare, raw=True).ids, None))
        else:
            bare = _checked(text, joined=raw)
            prompt, ids = encode_pair(tokenizer, question, bare, raw=raw)
            found.append(TeacherForcedText(bare, ids, prompt))
    return found


def score_teacher_forced(
    lm: RiskAwareLM,
    pairs: Sequence[tuple[Question | None, str]],
    *,
    raw: bool,
    alternatives: int,
    made: Made = "given",
) -> list[Answer]:
    """See ``RiskAwareLM.score_batch``. A question that comes several times is read once; ``made`` says whose texts."""
    return run_to_end(score_in_chunks(lm, encode_teacher_forced(lm.tokenizer, pairs, raw=raw), alternatives, made=made))


def score_in_chunks(
    lm: RiskAwareLM,
    given: Sequence[TeacherForcedText],
    alternatives: int,
    sizer: ChunkSizer | None = None,
    made: Made = "given",
) -> Generator[None, None, list[Answer]]:
    """Score texts side by side, piece by piece.

    Args:
        lm: The model.
        given: From ``encode_teacher_forced``.
        alternatives: How many of the most probable tokens are told with each token.
        sizer: Chooses the sizes of the pieces; None reads as much at once as memory for the logits allows.
        made: Whose texts they are.

    Yields:
        Nothing, after each piece.

    Returns:
        An answer per text, in their order.

    Raises:
        PromptError: If a text is too long.
    """
    found: dict[int, Answer] = {}
    bare = [i for i, item in enumerate(given) if item.prompt is None]
    if bare:
        texts = yield from _score_texts(lm, [given[i] for i in bare], alternatives, sizer)
        found |= zip(bare, texts, strict=True)
    asked = [i for i, item in enumerate(given) if item.prompt is not None]
    if asked:
        if bare:
            yield
        answers = yield from _score_answers(lm, [given[i] for i in asked], alternatives, sizer, made)
        found |= zip(asked, answers, strict=True)
    return [found[i] for i in range(len(given))]


def _score_texts(
    lm: RiskAwareLM, given: Sequence[TeacherForcedText], alternatives: int, sizer: ChunkSizer | None
) -> Generator[None, None, list[Answer]]:
    ids = [item.ids for item in given]
    lengths = [len(i) for i in ids]
    pool = HiddenStatePooler([[(n - 1, n)] for n in lengths], lengths) if lm.layers else None
    scored, _ = yield from prefill_in_chunks(HFStepper(lm.model, lm.layers, sizer), ids, alternatives, pool)
    found = []
    for row, item in enumerate(given):
        end = None if pool is None or pool.means is None else pool.means[row, 0].cpu()
        states = None if end is None else AnswerStates(lm.layers, end, end, end)  # without a question, but its end
        start = 1 if item.ids[:1] == [lm.tokenizer.bos_token_id] else 0
        tokens = yield from build_tokens_in_chunks(lm, scored[row][start:], item.ids[start:])
        found.append(lm.answer(tokens, [], "given", item.text, states, origin=Origin("given", TEXT)))
    return found


def _score_answers(
    lm: RiskAwareLM, given: Sequence[TeacherForcedText], alternatives: int, sizer: ChunkSizer | None, made: Made
) -> Generator[None, None, list[Answer]]:
    encoded = [item.prompt for item in given if item.prompt is not None]
    prompts = {tuple(prompt.ids): prompt for prompt in encoded}
    place = {ids: row for row, ids in enumerate(prompts)}
    rows = [place[tuple(prompt.ids)] for prompt in encoded]
    lengths = [len(ids) for ids in prompts]
    texts = [item.ids for item in given]
    asked = HiddenStatePooler([[find_last_user_token(p)] for p in prompts.values()], lengths) if lm.layers else None
    rest = (
        HiddenStatePooler([[(0, len(t) - 1)] for t in texts], [len(t) for t in texts], "right") if lm.layers else None
    )
    stepper = HFStepper(lm.model, lm.layers, sizer)
    # Whether a text is what the model would say also hangs on its end; only a calibration asks for it.
    longest = max(len(prompt.ids) + len(t) for prompt, t in zip(encoded, texts, strict=True))
    room = stepper.context is None or longest <= stepper.context
    ends = lm.stop_ids if lm.calibration is not None and room else ()
    read_once, following = yield from prefill_in_chunks(stepper, [list(ids) for ids in prompts], alternatives, asked)
    questions = []
    for scored_prompt, prompt in zip(read_once, prompts.values(), strict=True):
        questions.append((yield from build_question_in_chunks(lm, scored_prompt, prompt)))
    yield
    stepper.keep(rows)
    following = following.of(rows)
    scored = yield from teacher_force_in_chunks(stepper, following, texts, alternatives, rest, ends)
    found = []
    for i, item in enumerate(given):
        end_gap = scored[i].pop().gap if ends else 0.0 if room else math.inf
        origin = Origin(made, encoded[i].form, end_gap=end_gap)
        states = None
        if asked is not None and asked.means is not None and following.states is not None:
            first, n = following.states[0, i], len(texts[i])
            others = 0.0 if rest is None or rest.means is None else rest.means[i, 0]
            mean = (first + (n - 1) * others) / n
            states = AnswerStates(lm.layers, asked.means[rows[i], 0].cpu(), first.cpu(), mean.cpu())
        tokens = yield from build_tokens_in_chunks(lm, scored[i], item.ids, find_unscored_tokens(encoded[i]))
        found.append(lm.answer(tokens, questions[rows[i]], "given", item.text, states, origin=origin))
    return found


def _checked(text: str, *, joined: bool) -> str:
    bare = strip_answer(text, joined=joined)
    if not bare.strip():
        raise PromptError("the text to score is empty")
    return bare
