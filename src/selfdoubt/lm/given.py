"""Scores text that exists already, teacher-forced, several texts side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from selfdoubt.errors import PromptError
from selfdoubt.lm import detokenizer
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.calibration import States
from selfdoubt.lm.conditions import Made, Origin
from selfdoubt.lm.form import TEXT
from selfdoubt.lm.prompt import encode, encode_pair, strip_answer
from selfdoubt.lm.reading import ScoredId, follow, read
from selfdoubt.lm.states import StatePool
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.stream import own_end, told_before

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM

Question = str | Sequence[Mapping[str, str]]


def score_given(
    lm: RiskAwareLM,
    pairs: Sequence[tuple[Question | None, str]],
    *,
    raw: bool,
    alternatives: int,
    made: Made = "given",
) -> list[Answer]:
    """See ``RiskAwareLM.score_batch``. A question that comes several times is read once; ``made`` says whose texts."""
    found: dict[int, Answer] = {}
    bare = [i for i, (question, _) in enumerate(pairs) if question is None]
    if bare:
        found |= zip(bare, _score_texts(lm, [pairs[i][1] for i in bare], alternatives), strict=True)
    asked = [i for i, (question, _) in enumerate(pairs) if question is not None]
    if asked:
        own = [(question, text) for question, text in pairs if question is not None]
        found |= zip(asked, _score_answers(lm, own, raw=raw, alternatives=alternatives, made=made), strict=True)
    return [found[i] for i in range(len(pairs))]


def _score_texts(lm: RiskAwareLM, texts: Sequence[str], alternatives: int) -> list[Answer]:
    texts = [_checked(text, joined=True) for text in texts]
    ids = [encode(lm.tokenizer, text, raw=True).ids for text in texts]
    lengths = [len(i) for i in ids]
    pool = StatePool([[(n - 1, n)] for n in lengths], lengths) if lm.layers else None
    scored, _ = read(HFStepper(lm.model, lm.layers), ids, alternatives, pool)
    found = []
    for row, text in enumerate(texts):
        end = None if pool is None or pool.means is None else pool.means[row, 0].cpu()
        states = None if end is None else States(lm.layers, end, end, end)  # without a question, but its end
        start = 1 if ids[row][:1] == [lm.tokenizer.bos_token_id] else 0
        tokens = _tokens(lm, scored[row][start:], ids[row][start:])
        found.append(lm.answer(tokens, [], "given", text, states, origin=Origin("given", TEXT)))
    return found


def _score_answers(
    lm: RiskAwareLM, pairs: Sequence[tuple[Question, str]], *, raw: bool, alternatives: int, made: Made
) -> list[Answer]:
    pairs = [(question, _checked(text, joined=raw)) for question, text in pairs]
    encoded = [encode_pair(lm.tokenizer, question, text, raw=raw) for question, text in pairs]
    prompts = {tuple(prompt.ids): prompt for prompt, _ in encoded}
    place = {ids: row for row, ids in enumerate(prompts)}
    rows = [place[tuple(prompt.ids)] for prompt, _ in encoded]
    lengths = [len(ids) for ids in prompts]
    texts = [ids for _, ids in encoded]
    asked = StatePool([[own_end(p)] for p in prompts.values()], lengths) if lm.layers else None
    rest = StatePool([[(0, len(t) - 1)] for t in texts], [len(t) for t in texts], "right") if lm.layers else None
    stepper = HFStepper(lm.model, lm.layers)
    # Whether a text is what the model would say also hangs on its end; only a calibration asks for it.
    longest = max(len(prompt.ids) + len(t) for (prompt, _), t in zip(encoded, texts, strict=True))
    room = stepper.context is None or longest <= stepper.context
    ends = lm.stop_ids if lm.calibration is not None and room else ()
    read_once, following = read(stepper, [list(ids) for ids in prompts], alternatives, asked)
    questions = [lm._own(scored, prompt) for scored, prompt in zip(read_once, prompts.values(), strict=True)]
    stepper.keep(rows)
    following = following.of(rows)
    scored = follow(stepper, following, texts, alternatives, rest, ends)
    found = []
    for i, (_, text) in enumerate(pairs):
        end_gap = scored[i].pop().gap if ends else 0.0 if room else math.inf
        origin = Origin(made, encoded[i][0].form, end_gap=end_gap)
        states = None
        if asked is not None and asked.means is not None and following.states is not None:
            first, n = following.states[0, i], len(texts[i])
            others = 0.0 if rest is None or rest.means is None else rest.means[i, 0]
            mean = (first + (n - 1) * others) / n
            states = States(lm.layers, asked.means[rows[i], 0].cpu(), first.cpu(), mean.cpu())
        tokens = _tokens(lm, scored[i], texts[i], told_before(encoded[i][0]))
        found.append(lm.answer(tokens, questions[rows[i]], "given", text, states, origin=origin))
    return found


def _tokens(
    lm: RiskAwareLM, scored: Sequence[ScoredId | None], ids: Sequence[int], before: Sequence[int] = ()
) -> list[Token]:
    pieces = zip(scored, detokenizer.texts(lm.tokenizer, ids, before), strict=True)
    return [lm._token(token, text) for token, text in pieces if token is not None]


def _checked(text: str, *, joined: bool) -> str:
    bare = strip_answer(text, joined=joined)
    if not bare.strip():
        raise PromptError("the text to score is empty")
    return bare
