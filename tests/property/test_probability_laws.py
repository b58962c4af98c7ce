"""Probabilities, entropies and shares stay in their ranges in any dtype, with any number of members and of classes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdoubt import risk
from selfdoubt.distributions import Distributions
from selfdoubt.lm.sampling import Sampling, choose_tokens
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.token_table import score_ids
from tests.strategies import seeds

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@st.composite
def next_logits(draw):
    """Logits ``(members, 2, classes)`` of a large vocabulary, from flat to one-hot, members alike or apart."""
    n, classes = draw(st.integers(1, 5)), draw(st.sampled_from([2, 7, 1000, 50_000]))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0, 10.0, 100.0]))
    apart = draw(st.sampled_from([0.0, 1e-3, 1.0]))
    generator = torch.Generator().manual_seed(draw(seeds))
    shared = torch.randn(1, 2, classes, generator=generator, dtype=torch.float64)
    own = torch.randn(n, 2, classes, generator=generator, dtype=torch.float64)
    shift = draw(st.sampled_from([0.0, 20.0, -300.0]))
    peak = torch.zeros(classes, dtype=torch.float64)
    peak[0] = draw(st.sampled_from([0.0, 15.0, 40.0]))
    return (scale * (shared + apart * own) + peak + shift).to(draw(st.sampled_from(DTYPES)))


@given(next_logits(), st.sampled_from([0.0, 1e-300, 0.1, 1.0, 1e308]), st.integers(1, 20), seeds)
@settings(max_examples=150)
def test_a_token_and_its_alternatives_share_one_distribution(logits, temperature, alternatives, seed):
    answer = risk.find_answer(risk.measure_members(logits))
    uniform = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = choose_tokens(answer, [Sampling(temperature=temperature)] * 2, uniform)
    exact = logits.double().softmax(-1).mean(0)
    for is_answer in (True, False):
        rows = score_ids(StepOutput(logits[:, :, None], None), chosen[:, None], alternatives, is_answer=is_answer)
        for (token,), own in zip(rows, exact, strict=True):
            named = dict(token.alternatives)
            probabilities = [math.exp(p) for p in {**named, token.id: token.logprob}.values()]
            assert sum(probabilities) <= 1
            assert len(named) == len(token.alternatives) == min(alternatives, logits.shape[-1])
            assert named.get(token.id, token.logprob) == token.logprob
            for i, p in {**named, token.id: token.logprob}.items():
                assert math.exp(p) == pytest.approx(float(own[i]), rel=2e-4, abs=1e-12)
            assert [*named.values()] == sorted(named.values(), reverse=True)
            if temperature == 0:
                assert token.logprob == max(named.values())


@given(next_logits(), st.integers(0, 1))
@settings(max_examples=150)
def test_scores_stay_in_their_ranges(logits, chosen):
    members, _, classes = logits.shape
    scores = risk.token_scores(logits, torch.full((2,), chosen))
    for total, aleatoric, epistemic in (
        (scores.total, scores.aleatoric, scores.epistemic),
        (risk.total(logits), risk.aleatoric(logits), risk.epistemic(logits)),
    ):
        for score, most in ((total, classes), (aleatoric, classes), (epistemic, members)):
            assert all(0 <= value <= math.log(most) for value in score.double().tolist())
        assert (total >= aleatoric).all()
        torch.testing.assert_close(total, aleatoric + epistemic, rtol=1e-5, atol=1e-6)
    assert (scores.logprob <= 0).all()
    assert ((scores.spread >= 0) & (scores.spread <= 0.5)).all()
    assert ((scores.disagreement >= 0) & (scores.disagreement <= 1)).all()


@given(next_logits())
@settings(max_examples=50)
def test_the_mixture_is_the_mean_of_the_members(logits):
    exact = logits.double().softmax(-1).mean(0)
    torch.testing.assert_close(risk.mixture(logits).double().softmax(-1), exact, rtol=2e-4, atol=1e-9)


@given(seeds)
def test_tokens_are_drawn_from_the_logits_and_not_from_their_rounding(seed):
    """A difference of two numbers in bfloat16 is rounded again: probabilities were wrong by some percent."""
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(64, 50, generator=generator)).bfloat16()
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    samplings = [Sampling(temperature=1.0)] * 64
    drawn, exact = (choose_tokens(Distributions.measure(x), samplings, uniform) for x in (logits, logits.double()))
    assert torch.equal(drawn, exact)
