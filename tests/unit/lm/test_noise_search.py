"""The search for the size of noise on a language model: against whole plain voters, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdoubt import RiskAwareLM, pocket, sample, sculpt, vote
from selfdoubt.errors import ConfigError, UntrainedWarning, WrapError
from selfdoubt.lm.noise_search import search_noise
from selfdoubt.lm.text.prompt import encode
from selfdoubt.noise import NoiseLimits, NoiseTrial, set_noise
from tests.ladder.rungs import noisy, voter
from tests.zoo import talker, tokenizer

QUESTIONS = ["What is the capital of France?", "Hi", "Which currency do they use in Japan?", "Where is Zürich?"]
WRAPPERS = {
    "vote": vote.Wrapper(n_voters=3, rank=2, weight_noise="auto", antithetic=True),
    "vote-base": vote.Wrapper(n_voters=2, weight_noise="auto", answer_from="base"),
    "normal": sample.Wrapper(n_samples=2, distribution=sample.Normal("auto")),
    "bernoulli": sample.Wrapper(n_samples=2, distribution=sample.Bernoulli("auto"), param_filter="proj"),
}
#: A random model is flat: its tokens flip early, and its distributions hardly differ.
LIMITS = NoiseLimits(flip_rate=0.1, divergence=0.01)


def build(name="vote"):
    return RiskAwareLM(WRAPPERS[name](talker()).eval(), tokenizer())


def compare_one_by_one(lm, max_tokens):
    """Share of flips and mean KL of each member as a plain model of its own, along the plain model's answers."""
    plain = RiskAwareLM(talker(), tokenizer())
    flips, divergences = [], []
    make = voter if isinstance(lm.model.spec, vote.Wrapper) else noisy
    count = getattr(lm.model.spec, "n_voters", None) or lm.model.spec.n_samples
    alone = [make(lm.model, talker(), m) for m in range(count)]
    for question in QUESTIONS:
        answer = plain.generate(question, max_tokens=max_tokens)
        prompt, ids = encode(tokenizer(), question).ids, [t.id for t in answer.tokens]
        first, last = len(prompt) - 1, len(prompt) + len(ids) - (answer.finish != "stop")
        whole = torch.tensor([prompt + ids])
        with torch.no_grad():
            base = talker()(whole).logits[0, first:last][:max_tokens]
            for model in alone:
                member = model(whole).logits[0, first:last][:max_tokens]
                flips += (member.argmax(-1) != base.argmax(-1)).tolist()
                divergences += stats.entropy(base.softmax(-1), member.softmax(-1), axis=-1).tolist()
    return np.mean(flips), np.mean(divergences)


@pytest.mark.parametrize("name", WRAPPERS)
def test_flips_and_divergence_against_members_one_by_one(name):
    lm = build(name)
    before = lm.model.spec
    result = search_noise(lm, QUESTIONS, limits=LIMITS, max_tokens=6, steps=5)
    flips, divergence = compare_one_by_one(lm, 6)
    assert result.flip_rate == pytest.approx(flips, abs=1e-9)
    assert result.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-9)
    assert result.divergence > 0
    assert all(trial.passed == (trial.alpha <= result.alpha) for trial in result.tried)
    assert lm.model.spec.answer_from == before.answer_from
    assert not lm.model.spec.seeks_noise


def test_the_largest_that_keeps_the_answers_is_just_below_one_that_does_not():
    lm = build()
    result = search_noise(lm, QUESTIONS, limits=LIMITS, max_tokens=6, steps=12)
    assert lm.model.spec.alpha == result.alpha
    failed = min(trial.alpha for trial in result.tried if not trial.passed)
    assert result.alpha < failed < result.alpha * 1.01
    set_noise(lm.model, failed)
    flips, divergence = compare_one_by_one(lm, 6)
    assert flips > 0.1 or divergence > 0.01


def test_answers_that_are_there_are_not_given_again():
    plain = RiskAwareLM(talker(), tokenizer())
    answers = plain.generate(QUESTIONS, max_tokens=6)
    ours, theirs = build(), build()
    assert search_noise(ours, QUESTIONS, answers=answers, limits=LIMITS, max_tokens=6, steps=4) == search_noise(
        theirs, QUESTIONS, limits=LIMITS, max_tokens=6, steps=4
    )


def test_progress_sees_each_trial():
    seen: list[NoiseTrial] = []
    result = search_noise(build(), QUESTIONS[:2], limits=LIMITS, max_tokens=3, steps=2, progress=seen.append)
    assert tuple(seen) == result.tried


@pytest.mark.parametrize(
    "wrapper",
    [
        vote.Wrapper(n_voters=2, rank=2, weight_noise="auto"),
        sample.Wrapper(n_samples=2, distribution=sample.Normal("auto")),
    ],
    ids=["vote", "sample"],
)
def test_loading_with_auto_searches_and_saves_what_it_found(model_folder, tmp_path, wrapper):
    with pytest.warns(UntrainedWarning, match="the answers are the base model's own"):
        lm = RiskAwareLM.load(model_folder, wrapper=wrapper)
    assert not lm.model.spec.seeks_noise
    assert lm.model.spec.has_base
    answer, plain = (m.generate(QUESTIONS[0], max_tokens=5) for m in (lm, RiskAwareLM.load(model_folder, wrapper=None)))
    assert [t.id for t in answer.tokens] == [t.id for t in plain.tokens]
    assert answer.scores["mean_nll"] == pytest.approx(plain.scores["mean_nll"], rel=1e-5)
    assert answer.scores["mean_divergence"] > 0
    lm.save(tmp_path, base=str(model_folder))
    again = RiskAwareLM.load(adapter=tmp_path)
    assert again.model.spec == lm.model.spec
    assert again.generate(QUESTIONS[0], max_tokens=5).scores == answer.scores


def test_nothing_to_search():
    with pytest.raises(ConfigError, match="got no questions; give about 32"):
        search_noise(build(), [])
    for model in (talker(), sculpt.Wrapper()(talker())):
        with pytest.raises(WrapError, match="only voters and samples have noise"):
            search_noise(RiskAwareLM(model, tokenizer()), QUESTIONS)


def test_rounding_in_a_narrow_dtype_is_not_taken_for_noise():
    limits = NoiseLimits()
    model = AutoModelForCausalLM.from_pretrained(pocket.folder(), dtype=torch.bfloat16)
    wrapper = vote.Wrapper(n_voters=2, rank=8, weight_noise="auto", antithetic=True)
    lm = RiskAwareLM(wrapper(model).eval(), AutoTokenizer.from_pretrained(pocket.folder()))
    result = search_noise(lm, max_tokens=12, steps=2)
    rounding, *others = result.tried
    assert rounding.flip_rate > 0
    assert rounding.divergence < 1e-3
    assert result.alpha > 1e-3
    for trial in others:
        assert trial.passed == (trial.flip_rate <= limits.flip_rate + rounding.flip_rate)
    assert result.flip_rate <= limits.flip_rate + rounding.flip_rate
