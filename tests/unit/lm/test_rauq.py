"""RAUQ against lm-polygraph, a closed form, and a slow reference on a model's own weights of attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from selfdoubt.lm.attention import middle_third
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.rauq import compute_rauq
from tests import oracles, real


def slow(logprobs, attention, alpha=0.2):
    """The formula, one layer, head and token at a time."""
    worst = -math.inf
    for layer in range(attention.shape[1]):
        head = 0
        if len(logprobs) > 1:
            head = max(range(attention.shape[2]), key=lambda h: sum(attention[1:, layer, h]))
        c = [math.exp(logprobs[0])]
        for i in range(1, len(logprobs)):
            c.append(alpha * math.exp(logprobs[i]) + (1 - alpha) * attention[i, layer, head] * c[-1])
        worst = max(worst, -sum(map(math.log, c)) / len(c))
    return worst


def random_answer(tokens, seed=0):
    draw = np.random.default_rng(seed)
    return -draw.exponential(size=tokens) * 2, draw.uniform(size=(tokens, 5, 3))


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_rauq_against_the_formula(tokens):
    for seed in range(5):
        logprobs, attention = random_answer(tokens, seed)
        assert compute_rauq(logprobs, attention) == pytest.approx(slow(logprobs, attention), rel=1e-12)
        assert compute_rauq(logprobs, attention, 0.5) == pytest.approx(slow(logprobs, attention, 0.5), rel=1e-12)


def test_with_all_weight_on_itself_alpha_one_is_the_mean_surprisal():
    logprobs, attention = random_answer(9)
    with np.errstate(divide="ignore"):
        assert compute_rauq(logprobs, attention, 1.0) == pytest.approx(-logprobs.mean())


def test_probabilities_that_underflow_stay_finite():
    assert compute_rauq(np.array([-2000.0, -3000.0]), np.zeros((2, 1, 1))) == pytest.approx(2500 - math.log(0.2) / 2)


def test_a_certain_answer_is_not_below_zero():
    assert compute_rauq(np.zeros(4), np.ones((4, 2, 2))) == 0


def test_rauq_against_lm_polygraph():
    oracles.load_alone("lm_polygraph.utils.common")
    theirs = oracles.load_alone("lm_polygraph.estimators.rauq").RAUQ(n_layers=6, n_heads=3)
    layers = middle_third(6)
    assert theirs.layers == list(layers)
    answers = [random_answer(tokens, seed) for seed, tokens in enumerate((2, 5, 30))]
    maps = []
    for logprobs, attention in answers:
        n = len(logprobs)
        weights = np.zeros((6, 3, n, n))
        for i in range(1, n):  # the step that predicts token i, on the token before it: on its own input
            weights[layers.start : layers.stop, :, i, i - 1] = attention[i, : len(layers)]
        maps.append(weights.reshape(18, n, n))
    known = {"attention_all": maps, "greedy_log_likelihoods": [logprobs for logprobs, _ in answers]}
    values = [compute_rauq(logprobs, attention[:, : len(layers)]) for logprobs, attention in answers]
    assert values == pytest.approx(theirs(known) - 1, abs=1e-9)


@pytest.mark.parametrize("name", ["smollm2", "gemma", "qwen"])
def test_a_real_model_s_rauq_against_its_eager_attention(name):
    folder, question = real.model(name), "What is the capital of France?"
    lm = RiskAwareLM.load(folder, dtype=torch.float32)
    answer = lm.generate(question, max_tokens=8, temperature=1.0, seed=2)
    again = lm.score_batch([(question, answer.text), ("Who?", "Nobody knows.")])[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for one in (answer, again):
        prompt = (
            lm.front.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            if lm.tokenizer.chat_template
            else question
        )
        start = lm.tokenizer(prompt, add_special_tokens=not lm.tokenizer.chat_template).input_ids
        ids = [token.id for token in one.tokens]
        with torch.inference_mode():
            output = model(torch.tensor([[*start, *ids]]), output_attentions=True)
        at = slice(len(start) - 1, len(start) - 1 + len(ids))
        layers = [
            output.attentions[i][0].diagonal(dim1=-2, dim2=-1).T[at] for i in middle_third(len(output.attentions))
        ]
        logprobs = output.logits[0, at].log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        expected = slow(logprobs.double().tolist(), torch.stack(layers, 1).double().numpy())
        assert one.scores["rauq"] == pytest.approx(expected, abs=1e-5)
