"""Hidden states overheard while answering are those of the model itself."""

from __future__ import annotations

import pytest
import torch

from selfdoubt import RiskAwareLM, vote
from selfdoubt.errors import ConfigError
from selfdoubt.lm.hidden_states import HiddenStatePooler, StateKey, find_decoder_layers
from selfdoubt.lm.text.prompt import encode
from tests.zoo import talker, tokenizer

QUESTIONS = ["What is the capital of France?", "Hi", "Which currency do they use in Łódź 😀?"]
VOTERS = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5)
LAYERS = (0, 1)


def close(found, expected):
    assert found.layers == expected.layers
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_states_while_answering_are_those_of_the_given_text_and_of_each_question_alone(options):
    lm = RiskAwareLM(VOTERS(talker()), tokenizer(), layers=LAYERS)
    found = lm.generate(QUESTIONS, max_tokens=6, **options)
    for question, answer in zip(QUESTIONS, found, strict=True):
        close(lm.generate(question, max_tokens=6, **options).states, answer.states)
        ids = [t.id for t in answer.tokens]
        if lm.tokenizer(answer.text, add_special_tokens=False)["input_ids"] == ids:
            close(lm.score(answer.text, question).states, answer.states)


def test_states_against_what_the_model_itself_calls_hidden():
    plain = talker()
    lm = RiskAwareLM(plain, tokenizer(), layers=LAYERS)
    text = "Some words"
    answer = lm.score(text, QUESTIONS[0])
    prompt = encode(lm.tokenizer, QUESTIONS[0])
    ids = prompt.ids + lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        hidden = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    hidden = [h.float() for h in hidden]
    last, first = max(i for i, own in enumerate(prompt.is_user_token) if own), len(prompt.ids) - 1
    # hidden_states[k + 1] is what layer k puts out, but for the last, which the model norms.
    torch.testing.assert_close(answer.states.question[0], hidden[1][0, last])
    torch.testing.assert_close(answer.states.first[0], hidden[1][0, first])
    torch.testing.assert_close(answer.states.mean[0], hidden[1][0, first:-1].mean(0))


def test_states_of_members_are_averaged_and_listening_leaves_no_trace():
    base = talker()
    before = [len(layer._forward_hooks) for layer in find_decoder_layers(base)]
    lm = RiskAwareLM(vote.Wrapper(n_voters=3, rank=2, weight_noise=0.0)(base), tokenizer(), layers=(1,))
    plain = RiskAwareLM(talker(), tokenizer(), layers=(1,))
    close(lm.score("Some words", QUESTIONS[0]).states, plain.score("Some words", QUESTIONS[0]).states)
    assert [len(layer._forward_hooks) for layer in find_decoder_layers(base)] == before


def test_no_states_are_kept_unless_asked_for():
    lm = RiskAwareLM(talker(), tokenizer())
    assert lm.generate("Hi", max_tokens=2).states is None


def test_a_layer_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^LlamaForCausalLM has the decoder layers 0 to \d+, and not 99$"):
        RiskAwareLM(talker(), tokenizer(), layers=(99,)).generate("Hi")


def test_a_pool_in_pieces_is_the_mean_over_its_places():
    states = torch.randn(2, 7, 3, 4)
    pool = HiddenStatePooler([[(0, 2), (3, 5)], [(1, 2), (4, 7)]], [5, 7])
    pool.add(0, states[:, :3])
    pool.add(3, states[:, 3:])
    torch.testing.assert_close(pool.means[0, 0], states[0, 2:4].mean(0))
    torch.testing.assert_close(pool.means[0, 1], states[0, 5:7].mean(0))
    torch.testing.assert_close(pool.means[1, 1], states[1, 4:7].mean(0))


@pytest.mark.parametrize("name", ["question.0", "first.2", "mean.31"])
def test_a_state_key_is_printed_as_it_is_parsed(name):
    assert str(StateKey.parse(name)) == name


@pytest.mark.parametrize("name", ["", "first", "first.", "first.-1", "last.2", "first.2.3"])
def test_a_name_that_is_not_a_state_key(name):
    with pytest.raises(ConfigError, match=r"states are named like 'first\.2' \(position\.layer\), got"):
        StateKey.parse(name)


def test_states_are_read_by_key():
    lm = RiskAwareLM(talker(), tokenizer(), layers=(1,))
    states = lm.generate("Hi", max_tokens=2).states
    assert states.get(StateKey("mean", 1)) is not None
    torch.testing.assert_close(states.get(StateKey("first", 1)), states.first[0])
    assert states.get(StateKey("first", 0)) is None
