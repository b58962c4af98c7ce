"""The density of a language model: the distance of the hidden state in which each token was chosen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from selfdoubt import RiskAwareLM, density, sculpt, vote
from selfdoubt.errors import ConfigError, DataError, UntrainedWarning
from selfdoubt.gaussian import Gaussian, Moments
from selfdoubt.lm.adapters.lora import add_lora
from selfdoubt.lm.density import fit_density
from selfdoubt.lm.load import load_model
from selfdoubt.lm.text.prompt import encode, encode_pair
from tests import real
from tests.zoo import packable, talker, tokenizer

PAIRS = [
    ("Where is Tartu?", "Tartu is in Estonia."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Who wrote Faust?", "Faust is by Goethe, who was born in Frankfurt."),
]
SETTINGS = {"shrinkage": 0.2}  # three short answers alone say little about a covariance


def make_lm(model=None, wrapper=None, **settings) -> RiskAwareLM:
    lm = RiskAwareLM((wrapper or (lambda m: m))(model or talker()).eval(), tokenizer())
    fit_density(lm, PAIRS, wrapper=density.Wrapper(**SETTINGS | settings))
    return lm


def read_states(pairs, *, whole):
    """The inputs of the head where the tokens of answers are chosen, and with ``whole`` also the user's."""
    states = []
    for question, text in pairs:
        prompt, ids = encode_pair(tokenizer(), question, text)
        with torch.no_grad():
            hidden = talker().model(input_ids=torch.tensor([[*prompt.ids, *ids]])).last_hidden_state[0]
        users = [place for place, is_user in enumerate(prompt.is_user_token) if is_user and whole]
        states.append(hidden[[p - 1 for p in (*users, *range(len(prompt.ids), len(prompt.ids) + len(ids)))]])
    return torch.cat(states)


def fit_gaussian(states):
    gaussian = Gaussian(states.shape[1])
    gaussian.fit(Moments.sum(states), **SETTINGS)
    return gaussian


@pytest.mark.parametrize("background", ["themselves", "others", "none"])
def test_densities_are_distances_of_the_states_in_which_tokens_were_chosen(background):
    others = {
        "themselves": PAIRS,
        "others": [(PAIRS[0][0], "No idea, but it is a nice town in the south.")],
        "none": [],
    }
    pairs = others[background]
    lm = RiskAwareLM(talker(), tokenizer())
    given = None if background == "themselves" else pairs
    fit_density(lm, PAIRS, given, wrapper=density.Wrapper(**SETTINGS), batch_size=2)
    states = read_states([("Why?", "It just is.")], whole=False)
    answers = fit_gaussian(read_states(PAIRS, whole=False))(states)
    (answer,) = lm.score_batch([("Why?", "It just is.")])
    expected = {"density": fit_gaussian(read_states(pairs, whole=True))(states) if pairs else answers}
    expected |= {"relative_density": answers - expected["density"]} if pairs else {}
    for signal in ("density", "relative_density"):
        measured = [getattr(t, signal) for t in answer.tokens]
        if signal not in expected:
            assert measured == [None] * len(measured)
            continue
        assert_close(torch.tensor(measured, dtype=torch.float64), expected[signal], rtol=1e-4, atol=1e-4)
        assert answer.scores[f"mean_{signal}"] == pytest.approx(float(expected[signal].mean()), rel=1e-3, abs=1e-4)
    assert len(answer.question) > 0
    assert None not in [t.density for t in answer.question]


def test_a_batch_gives_what_each_text_gives_alone():
    lm = make_lm()
    together = lm.score_batch(PAIRS)
    for pair, answer in zip(PAIRS, together, strict=True):
        (alone,) = lm.score_batch([pair])
        for a, b in zip((*answer.question, *answer.tokens), (*alone.question, *alone.tokens), strict=True):
            assert a.density == pytest.approx(b.density, rel=1e-6)
            assert a.relative_density == pytest.approx(b.relative_density, rel=1e-5, abs=1e-6)


def test_answers_stay_the_models_and_have_the_densities_of_scoring():
    lm, plain = make_lm(), RiskAwareLM(talker(), tokenizer())
    answer = lm.generate("Where is Tartu?", max_tokens=8)
    expected = plain.generate("Where is Tartu?", max_tokens=8)
    assert [t.id for t in answer.tokens] == [t.id for t in expected.tokens]
    assert [t.logprob for t in answer.tokens] == [t.logprob for t in expected.tokens]
    assert "mean_density" not in expected.scores
    assert {"mean_density", "sum_density", "max_density", "question_mean_density", "both_max_density"} <= set(
        answer.scores
    )
    ids = [*encode(tokenizer(), "Where is Tartu?").ids, *(t.id for t in answer.tokens)]
    with torch.no_grad():
        hidden = talker().model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    distances = density.find_measured_leaf(lm.model).measure(hidden[-len(answer.tokens) - 1 : -1])
    measured = torch.tensor([t.relative_density for t in answer.tokens], dtype=torch.float64)
    assert_close(measured, distances, rtol=1e-5, atol=1e-5)


def test_a_saved_density_gives_the_same_answers(tmp_path, model_folder):
    lm = RiskAwareLM.load(model_folder)
    fit_density(lm, PAIRS, wrapper=density.Wrapper(**SETTINGS))
    lm.reference = {"sum_nll": [0.0, 1000.0], "mean_relative_density": [-100.0, 100.0]}
    lm.save(tmp_path / "adapter")
    loaded = RiskAwareLM.load(model_folder, adapter=tmp_path / "adapter")
    answer = lm.generate("Where is Tartu?", max_tokens=8)
    assert loaded.generate("Where is Tartu?", max_tokens=8) == answer
    assert isinstance(loaded.model.spec, density.Wrapper)
    ranks = answer.scores["sum_nll"] / 1000, (answer.scores["mean_relative_density"] + 100) / 200
    assert answer.scores["rank_density"] == pytest.approx((2 * ranks[0] + ranks[1]) / 3)


@pytest.mark.parametrize(
    "wrapper",
    [
        vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5), sculpt.Wrapper(),
        lambda m: vote.Wrapper(n_voters=2)(sculpt.Wrapper()(m)),
    ],
    ids=["vote", "sculpt", "both"],
)  # fmt: skip
def test_a_density_changes_no_other_score(wrapper, tmp_path):
    torch.manual_seed(3)
    model = wrapper(talker()).eval()
    before = RiskAwareLM(model, tokenizer()).generate("Where is Tartu?", max_tokens=8)
    lm = RiskAwareLM(model, tokenizer())
    fit_density(lm, PAIRS, wrapper=density.Wrapper(**SETTINGS))
    after = lm.generate("Where is Tartu?", max_tokens=8)
    assert {n: v for n, v in after.scores.items() if not n.endswith("density")} == before.scores
    assert after.scores["mean_density"] != 0
    lm.save(tmp_path / "adapter")
    talker().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    again = RiskAwareLM.load(tmp_path / "base", adapter=tmp_path / "adapter").generate("Where is Tartu?", max_tokens=8)
    assert again.scores == pytest.approx(after.scores, rel=1e-6)


def test_members_have_the_mean_of_their_distances():
    model = vote.Wrapper(n_voters=3, weight_noise=0.5, answer_from="mean")(talker()).eval()
    lm = RiskAwareLM(model, tokenizer())
    fit_density(lm, PAIRS, wrapper=density.Wrapper(**SETTINGS))
    (answer,) = lm.score_batch(PAIRS[:1])
    prompt, ids = encode_pair(tokenizer(), *PAIRS[0])
    with torch.no_grad():
        lm.model.forecast(input_ids=torch.tensor([[*prompt.ids, *ids]]))
    leaf = density.find_measured_leaf(lm.model)
    distances = leaf.measure(leaf.read_features()[:, len(prompt.ids) - 1 : -1]).mean(0)
    measured = torch.tensor([t.relative_density for t in answer.tokens], dtype=torch.float64)
    assert_close(measured, distances, rtol=1e-5, atol=1e-5)


def test_fitting_again_replaces_the_statistics():
    lm = make_lm()
    fit_density(lm, PAIRS[:2])
    other = RiskAwareLM(talker(), tokenizer())
    fit_density(other, PAIRS[:2], wrapper=density.Wrapper(**SETTINGS))
    assert lm.score_batch(PAIRS)[2].scores == other.score_batch(PAIRS)[2].scores


@pytest.mark.parametrize("kind", ["lora", "lora-on-head", "tied"])
def test_heads_of_other_kinds(kind):
    model = copy.deepcopy(talker())
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        add_lora(model, r=2, targets="lm_head" if kind == "lora-on-head" else None).requires_grad_(False)
    (answer,) = make_lm(model).score_batch(PAIRS[:1])
    (expected,) = RiskAwareLM(model, tokenizer()).score_batch(PAIRS[:1])
    assert [t.logprob for t in answer.tokens] == [t.logprob for t in expected.tokens]
    assert None not in [t.density for t in answer.tokens]


def test_four_bit_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    packable().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, quantize="nf4", device="cpu")
    (answer,) = make_lm(model).score_batch(PAIRS[:1])
    assert None not in [t.density for t in answer.tokens]


def test_what_cannot_be_fitted_is_refused():
    lm = RiskAwareLM(talker(), tokenizer())
    with pytest.raises(DataError, match="got none"):
        fit_density(lm, [])
    with pytest.raises(ConfigError, match="measured at each token"):
        fit_density(lm, PAIRS, wrapper=density.Wrapper(pooled=True))


def test_a_density_without_statistics_leaves_a_model_plain(model_folder):
    with pytest.warns(UntrainedWarning, match="this density has no statistics yet"):
        lm = RiskAwareLM.load(model_folder, wrapper=density.Wrapper())
    assert "mean_density" not in lm.generate("Where is Tartu?", max_tokens=4).scores


def test_a_real_model():
    folder = real.model("smollm2")
    lm = RiskAwareLM.load(folder)
    expected = lm.generate("What is the capital of France?", max_tokens=8)
    fit_density(lm, PAIRS)
    answer = lm.generate("What is the capital of France?", max_tokens=8)
    assert answer.text == expected.text
    assert {n: v for n, v in answer.scores.items() if not n.endswith("density")} == expected.scores
    seen, other = (
        lm.score_batch([pair])[0].scores["mean_density"] for pair in (PAIRS[1], ("Why?", "x = [1, 2][::-1]"))
    )
    assert seen < other  # what it was fitted on is nearer
