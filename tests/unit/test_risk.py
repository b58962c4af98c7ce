"""The maths of doubt against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp, softmax
from torch.testing import assert_close

from selfdoubt import risk
from selfdoubt.errors import NonFiniteError, ShapeError
from selfdoubt.forecast import Forecast


def random_logits(*shape, dtype=torch.float64):
    return 3 * torch.randn(shape, dtype=torch.float64).to(dtype)


def test_entropies_against_scipy():
    logits = random_logits(4, 2, 3, 7)
    probs = softmax(logits.numpy(), -1)
    total, members = stats.entropy(probs.mean(0), axis=-1), stats.entropy(probs, axis=-1)
    assert_close(risk.total(logits).numpy(), total)
    assert_close(risk.aleatoric(logits).numpy(), members.mean(0))
    assert_close(risk.epistemic(logits).numpy(), total - members.mean(0))


@pytest.mark.parametrize("q", [0.5, 0.7, 0.99])
def test_mutual_information_of_two_mirrored_coins_by_hand(q):
    # One member says heads with probability q, the other with 1 - q: the mean is a fair coin, I = log 2 - H(q).
    logits = torch.tensor([[q, 1 - q], [1 - q, q]], dtype=torch.float64).log()[:, None]
    h = -q * math.log(q) - (1 - q) * math.log(1 - q)
    assert risk.total(logits).item() == pytest.approx(math.log(2))
    assert risk.aleatoric(logits).item() == pytest.approx(h)
    assert risk.epistemic(logits).item() == pytest.approx(math.log(2) - h)


@pytest.mark.parametrize("members", [1, 2, 5])
def test_members_sure_of_different_classes_reach_the_bound(members):
    logits = 1e4 * torch.eye(members, 6)[:, None]
    assert risk.epistemic(logits).item() == pytest.approx(math.log(members), abs=1e-6)
    assert risk.aleatoric(logits).item() == 0


def test_token_scores_against_definitions():
    logits, chosen = random_logits(4, 2, 3, 7), torch.randint(7, (2, 3))
    probs = softmax(logits.numpy(), -1)
    taken = torch.from_numpy(probs).gather(-1, chosen[None, ..., None].expand(4, -1, -1, 1))[..., 0]
    found = risk.token_scores(logits, chosen)
    assert_close(found.logprob, taken.mean(0).log())
    assert_close(found.total, risk.total(logits))
    assert_close(found.aleatoric, risk.aleatoric(logits))
    assert_close(found.epistemic, risk.epistemic(logits))
    assert_close(found.disagreement, (logits.argmax(-1) != chosen).double().mean(0))
    assert_close(found.spread, taken.std(0, correction=0))


def test_mix_is_the_mean_of_probabilities_on_the_members_scale():
    logits = random_logits(4, 2, 7)
    mixed = risk.mix(logits)
    assert_close(mixed.softmax(-1), logits.softmax(-1).mean(0))
    assert_close(mixed.logsumexp(-1).numpy(), logsumexp(logits.numpy(), -1).mean(0))
    assert_close(risk.mix(logits + 5), mixed + 5)


def test_one_member_comes_back_as_it_is():
    logits = random_logits(1, 2, 7, dtype=torch.bfloat16)
    assert torch.equal(risk.mix(logits), logits[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_over_classes_run_in_float32(dtype):
    logits = random_logits(3, 2, 5000, dtype=dtype)
    chosen = torch.tensor([1, 2])
    scores = risk.token_scores(logits, chosen), risk.token_scores(logits.double(), chosen)
    for found, exact in zip(*(s[:-1] for s in scores), strict=True):
        assert found.dtype == torch.float32
        assert_close(found, exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [(0, 0, 0), (2, 1, 6)])
def test_numbers_that_are_not_finite_never_become_a_risk(bad, position):
    logits = random_logits(3, 2, 7)
    logits[position] = bad
    functions = (risk.total, risk.aleatoric, risk.epistemic, lambda x: risk.token_scores(x, torch.tensor([0, 0])))
    for function in functions:
        with pytest.raises(NonFiniteError) as error:
            function(logits)
        assert str(error.value).startswith("1 of 2 positions have NaN or infinite logits")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 3, 0)])
def test_logits_without_members_or_classes(shape):
    with pytest.raises(ShapeError, match=r"^logits must be \(members, \.\.\., classes\), got shape .*logits\[None\]$"):
        risk.total(torch.ones(shape))


def test_percentile_against_scipy():
    reference = sorted(torch.randn(101, generator=torch.Generator().manual_seed(0)).round(decimals=1).tolist())
    for value in (-9.0, *reference[::10], 0.05, 9.0):
        expected = stats.percentileofscore(reference, value, kind="mean") / 100
        assert risk.percentile(value, reference) == pytest.approx(expected)


def test_percentile_of_nothing_and_of_nan():
    with pytest.raises(ShapeError, match=r"at least one reference value, got none$"):
        risk.percentile(1.0, [])
    with pytest.raises(NonFiniteError, match=r"got nan$"):
        risk.percentile(math.nan, [1.0])


def test_a_forecast_of_values():
    members = random_logits(4, 5, 2)
    forecast = Forecast(members)
    assert_close(forecast.mean, members.mean(0))
    assert_close(forecast.std, members.std(0, correction=0))


def test_a_forecast_of_classes():
    members = random_logits(4, 5, 3)
    forecast = Forecast(members, kind="logits")
    assert_close(forecast.total, forecast.aleatoric + forecast.epistemic)
    assert_close(forecast.mean.softmax(-1), members.softmax(-1).mean(0))


def test_a_forecast_of_integers_is_a_vote():
    forecast = Forecast(torch.tensor([[1, 5], [1, 6], [2, 6], [1, 6]]))
    assert forecast.mean.tolist() == [1, 6]
    assert forecast.std.tolist() == [0.25, 0.25]


def test_a_low_precision_forecast_sums_in_float32():
    members = (100 + random_logits(5, 3)).to(torch.bfloat16)
    assert_close(Forecast(members).std, members.float().std(0, correction=0).to(torch.bfloat16))


def test_with_a_base_row_the_base_answers_and_the_others_disagree():
    logits = torch.randn(4, 5, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    chosen = torch.randint(11, (5,), generator=torch.Generator().manual_seed(2))
    scores = risk.token_scores(logits, chosen, has_base=True)
    base, others = risk.token_scores(logits[:1], chosen), risk.token_scores(logits[1:], chosen)
    assert_close(scores.logprob, base.logprob, rtol=0, atol=0)
    assert_close(scores.total, base.total, rtol=0, atol=0)
    for name in ("aleatoric", "epistemic", "disagreement", "spread"):
        assert_close(getattr(scores, name), getattr(others, name), rtol=0, atol=0)
    p = logits.softmax(-1).numpy()
    expected = np.mean([stats.entropy(p[0], q, axis=-1) for q in p[1:]], axis=0)
    assert_close(scores.divergence, torch.from_numpy(expected))
    assert risk.mixture(logits, has_base=True) is not logits
    assert torch.equal(risk.mixture(logits, has_base=True), logits[0])
    with pytest.raises(ShapeError, match="at least one more member"):
        risk.token_scores(logits[:1], chosen, has_base=True)


def test_confidence_scores_against_scipy():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    scores = risk.confidence_scores(logits)
    p = logits.softmax(-1).numpy()
    largest = np.sort(p, -1)
    assert_close(scores.margin, torch.from_numpy(1 - (largest[:, -1] - largest[:, -2])))
    expected = stats.entropy(np.full_like(p, 1 / 9), p, axis=-1)
    assert_close(scores.self_certainty, torch.from_numpy(-expected))


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_scores_in_one_go_are_the_scores_one_by_one(members, has_base, dtype):
    if has_base and members == 1:
        return
    logits = (random_logits(members, 4, 300) * 4).to(dtype)
    chosen, mixed = torch.tensor([0, 5, 7, 299]), risk.mixture(logits, has_base=has_base)
    each = risk.measure_members(logits, has_base=has_base)
    answer = risk.find_answer(each, has_base=has_base)
    assert_close(answer.centred - answer.lognorm[:, None], mixed.to(answer.centred.dtype).log_softmax(-1))
    assert_close(answer.probs, mixed.to(answer.probs.dtype).softmax(-1))
    assert torch.equal(answer.top, mixed.argmax(-1))
    scores = risk.score_members(each, chosen, answer, has_base=has_base)
    for a, b in zip(scores, risk.token_scores(logits, chosen, has_base=has_base), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    top = answer.centred.topk(3).indices
    for a, b in zip(risk.score_confidence(answer, top), risk.confidence_scores(mixed), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    logprob, logprobs = risk.fit_logprobs(answer, chosen, top)
    assert_close(logprob, scores.logprob.double(), rtol=1e-6, atol=1e-6)
    assert_close(logprobs.float(), mixed.float().log_softmax(-1).gather(-1, top), rtol=1e-5, atol=1e-6)


def test_named_probabilities_add_up_to_at_most_one_whatever_the_rounding():
    generator = torch.Generator().manual_seed(5)
    logits = 9 * torch.randn(3, 500, 7, generator=generator)
    answer = risk.find_answer(risk.measure_members(logits))
    everything = answer.centred.topk(7).indices
    for chosen in (everything[:, 0], everything[:, 6]):
        logprob, logprobs = risk.fit_logprobs(answer, chosen, everything)
        assert (logprobs.exp().sum(-1) <= 1).all()
        assert torch.equal(
            logprob, logprobs.gather(-1, (everything == chosen[:, None]).long().argmax(-1)[:, None])[:, 0]
        )
        # One that is not among them counts, too.
        apart = risk.fit_logprobs(answer, everything[:, 6], everything[:, :6])
        assert (apart[1].exp().sum(-1) + apart[0].exp() <= 1).all()
