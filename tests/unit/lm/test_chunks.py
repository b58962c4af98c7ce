"""Pieces are sized by the time they take, and their sizes change no number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdoubt import RiskAwareLM, sample, sculpt, vote
from selfdoubt.lm.chunks import FEWEST, ChunkSizer
from selfdoubt.lm.prefill import prefill, prefill_in_chunks, run_to_end
from selfdoubt.lm.scoring import encode_teacher_forced, score_in_chunks
from selfdoubt.lm.stepper import HFStepper
from tests import zoo


class Script(ChunkSizer):
    """Says sizes that were written down before, over and over."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.asked = list(sizes), []

    def columns(self, rows, context, most):
        self.asked.append(min(most, self.sizes[len(self.asked) % len(self.sizes)]))
        return self.asked[-1]


def counted(pieces):
    """What a generator returns, and how often it has yielded."""
    yields = 0
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value, yields
        yields += 1


@pytest.mark.parametrize("family", zoo.FAMILIES)
@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_no_size_of_pieces_changes_what_a_prompt_says(family, sizes):
    prompts = [[3, 9, 20, 31, 7, 5, 11, 2, 40, 33, 12, 8, 19, 6, 1, 30], [12, 5, 7, 41, 9]]
    prompts = prompts[:1] if family == "gemma2" else prompts  # with left padding it is NaN in float64 by itself
    expected, following = prefill(HFStepper(zoo.causal(family)), prompts, 2)
    sizer = Script(sizes)
    (found, after), yields = counted(prefill_in_chunks(HFStepper(zoo.causal(family), (), sizer), prompts, 2))
    assert sum(sizer.asked) == 16
    assert yields == len(sizer.asked) - 1
    for mine, theirs in zip(found, expected, strict=True):
        assert [t and t.id for t in mine] == [t and t.id for t in theirs]
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            assert [i for i, _ in a.alternatives] == [i for i, _ in b.alternatives]
    assert torch.allclose(after.logits, following.logits, atol=1e-5)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
PAIRS = [
    ("What is the capital of France?", "Paris is the capital of France, and it was so for a long time."),
    (None, "The capital of Japan is Tokyo, of Peru Lima, and of France Paris."),
    ("Where?", "x"),
    (CHAT, "é" * 9),
    (None, "yen"),
]


@pytest.mark.parametrize("wrapper", [None, vote.Wrapper(n_voters=2, rank=2), sample.Wrapper(), sculpt.Wrapper()])
@pytest.mark.parametrize("sizes", [[1], [2, 5, 1], [16], [10**6]])
def test_no_size_of_pieces_changes_a_score(wrapper, sizes):
    model = zoo.talker() if wrapper is None else wrapper(zoo.talker()).eval()
    lm = RiskAwareLM(model, zoo.tokenizer(), layers=[1])
    expected = lm.score_batch(PAIRS)
    work = score_in_chunks(lm, encode_teacher_forced(lm.tokenizer, PAIRS, raw=False), 5, Script(sizes))
    found, yields = counted(work)
    assert yields > len(PAIRS[0][1]) / 4 if sizes == [1] else yields >= 2
    for mine, alone in zip(found, expected, strict=True):
        assert mine.text == alone.text
        assert [(t.id, t.text) for t in mine.tokens] == [(t.id, t.text) for t in alone.tokens]
        assert [(t.id, t.text) for t in mine.question] == [(t.id, t.text) for t in alone.question]
        assert dict(mine.scores) == pytest.approx(dict(alone.scores), abs=1e-8)
        assert torch.allclose(mine.states.mean, alone.states.mean, atol=1e-5)


def test_without_a_sizer_a_score_in_pieces_is_the_score_to_the_bit():
    lm = RiskAwareLM(vote.Wrapper(n_voters=2, rank=2)(zoo.talker()).eval(), zoo.tokenizer())
    found = run_to_end(score_in_chunks(lm, encode_teacher_forced(lm.tokenizer, PAIRS, raw=False), 5))
    assert found == lm.score_batch(PAIRS)


@settings(deadline=None)
@given(
    fixed=st.floats(0, 3), rate=st.floats(1e-6, 0.05), growth=st.floats(0, 1e-3), rows=st.integers(1, 96),
    seconds=st.floats(0.05, 1),
)  # fmt: skip
def test_a_piece_takes_about_the_time_it_should(fixed, rate, growth, rows, seconds):
    """On a machine whose passes cost ``fixed + tokens * rate * (1 + growth * context)`` seconds."""
    sizer = ChunkSizer()

    def read_piece(rows, context, most):
        sizer.begin(seconds)
        size = sizer.columns(rows, context, most)
        assert 1 <= size <= most
        assert size == most or math.log2(size).is_integer() or math.log2(size / 3).is_integer()
        took = fixed + rows * size * rate * (1 + growth * (context + size / 2))
        sizer.learn(took)
        return size, took

    read_piece(1, 0, 2)
    for context in (0, 32, 64, 100):  # it learns
        read_piece(1, context, 32)
    for _ in range(2):
        context = 0
        while context < 6000:
            size, took = read_piece(rows, context, 6000 - context)
            context += size
            least = fixed + max(rows, FEWEST) * rate * (1 + growth * context)  # no piece can be smaller than this
            assert took <= max(2.1 * seconds, 4.2 * fixed, 1.6 * least)  # half as long again as the smallest costs


@given(st.floats(1e-5, 1e-3))
def test_cheap_tokens_are_read_many_at_a_time(rate):
    sizer = ChunkSizer()
    took = 0.0
    for _ in range(40):
        sizer.begin(0.2)
        took = 0.01 + rate * sizer.columns(1, 1000, 10**9)
        sizer.learn(took)
    assert took > 0.05


def test_pieces_grow_again_where_every_pass_has_become_slower():
    sizer = ChunkSizer()

    def sizes(fixed, rate):
        found = []
        for _ in range(40):
            sizer.begin(0.22)
            found.append(sizer.columns(1, 500, 10**6))
            sizer.learn(fixed + rate * found[-1])
        return found

    assert sizes(0.03, 0.004)[-1] >= 32
    slow = sizes(0.12, 0.012)
    assert min(slow) == FEWEST  # at first the whole excess counts as the tokens' cost
    assert slow[-1] > FEWEST
    assert sizes(0.03, 0.004)[-1] >= 32


def test_a_slow_piece_counts_at_once_and_is_forgotten_by_and_by():
    sizer = ChunkSizer()

    def size(rate):
        sizer.begin(0.2)
        found = sizer.columns(1, 1000, 10**9)
        sizer.learn(rate * found)
        return found

    before = [size(0.0001) for _ in range(30)][-1]
    size(0.01)
    assert size(0.0001) <= before / 8
    assert [size(0.0001) for _ in range(30)][-1] == before


def test_what_is_begun_and_failed_teaches_nothing():
    sizer = ChunkSizer()
    sizer.begin(0.2)
    sizer.columns(1, 0, 10)
    sizer.begin(0.2)
    sizer.learn(5.0)
    assert sizer.tokens(0) == FEWEST
