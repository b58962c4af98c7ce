"""Where answers end: the tokens that end them, and what an answer that ends at once is scored by."""

from __future__ import annotations

import copy
import math

import pytest

from selfdoubt import RiskAwareLM, vote
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.load import find_stop_ids, find_turn_end
from tests.speakers import CHATML
from tests.zoo import CHAT, talker, tokenizer

QUESTION = "What is the capital of France?"


def made(template, *, eos="<|end|>", bos="<|bos|>", extra=("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")):
    """A tokenizer with this template, in which the special tokens of both kinds of chats are known."""
    words = copy.deepcopy(tokenizer())
    words.add_special_tokens({"additional_special_tokens": list(extra)})
    words.chat_template, words.eos_token, words.bos_token = template, eos, bos
    return words


def turns(before, after, *, forced=""):
    return (
        "{% for m in messages %}" + before + "{{ m.content }}" + after + "{% endfor %}"
        "{% if add_generation_prompt %}" + before.replace("{{ m.role }}", "assistant") + "{% endif %}" + forced
    )  # fmt: skip


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (turns("<|im_start|>{{ m.role }}\n", "\n<|im_end|>\n"), "<|im_end|>"),
        (turns("<|im_start|>{{ m.role }}\n", "<|im_end|>\n", forced="<|im_start|>assistant\n"), "<|im_end|>"),
        (turns("", "{{ eos_token }}"), "<|end|>"),
        (turns("{{ m.role }}: ", "<|im_end|>"), "<|im_end|>"),
        (CHAT, "<|end|>"),
        # Nothing that opens a turn, begins a text, or is a word.
        (turns("<|{{ m.role }}|>", ""), None),
        (turns("<|{{ m.role }}|>", "", forced="<|assistant|>"), None),
        (turns("<|im_start|>{{ m.role }}\n", "\n", forced="<|im_start|>assistant\n"), None),
        (turns("{{ bos_token }}{{ m.role }}: ", "\n{{ bos_token }}"), None),
        (turns("{{ m.role }}: ", "\n"), None),
        (turns("{{ m.role }}: ", " the end <|im_end|>"), None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_token_that_ends_a_turn_is_the_one_behind_the_answers_words(template, end):
    words = made(template)
    assert find_turn_end(words) == (None if end is None else words.convert_tokens_to_ids(end))


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("eos", [None, "<|end|>"])
@pytest.mark.parametrize("named", [None, 7, [7, 9]])
@pytest.mark.parametrize("inherited", [None, 2, [2, 60], 60])
def test_every_end_that_is_named_anywhere_ends_an_answer(template, eos, named, inherited):
    words, model = made(template, eos=eos), copy.deepcopy(talker())
    model.generation_config.eos_token_id = named
    model.config.eos_token_id = inherited
    expected = {7, 9} if isinstance(named, list) else set() if named is None else {named}
    expected |= {2} & {inherited if isinstance(inherited, int) else (inherited or [0])[0]}  # 60 is a word
    expected |= set() if eos is None else {words.convert_tokens_to_ids(eos)}
    expected |= set() if template is None else {words.convert_tokens_to_ids("<|im_end|>")}
    assert find_stop_ids(model, words) == expected


def test_an_answer_ends_with_the_turn_of_its_template():
    """A base model whose text ends with one token, and whose turns end with another."""
    words = made(CHATML)
    end = words.convert_tokens_to_ids("<|im_end|>")
    model = copy.deepcopy(talker())
    model.resize_token_embeddings(len(words), mean_resizing=False)
    free = RiskAwareLM(model, words).generate(QUESTION, max_tokens=4)
    model.lm_head.weight[end] = 3 * model.lm_head.weight[free.tokens[0].id]  # it is said at once
    answer = RiskAwareLM(model, words).generate(QUESTION, max_tokens=20)
    assert (answer.text, answer.finish) == ("", "stop")


def calibrated(**options):
    head = Calibration("isotonic", ("sum_nll",), knots=((0.0, 0.9), (50.0, 0.1)), threshold=0.5)
    return RiskAwareLM(vote.Wrapper(n_voters=2, rank=2)(talker()).eval(), tokenizer(), calibration=head, **options)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("by_text", [True, False])
def test_an_answer_that_ends_at_once_is_scored_by_its_end(by_text, raw):
    lm = calibrated(layers=(1,))
    free = lm.generate(QUESTION, max_tokens=6, raw=raw)
    first = free.tokens[0]
    stop = [free.text[: len(first.text)] if by_text else first.id]
    answer = lm.generate(QUESTION, max_tokens=6, stop=stop, raw=raw)
    assert (answer.text, answer.tokens, answer.finish) == ("", (), "stop")
    for pool in ("sum", "mean", "max"):
        assert answer.scores[f"{pool}_nll"] == pytest.approx(first.nll)
        assert answer.scores[f"{pool}_total"] == pytest.approx(first.total)
    assert answer.scores.keys() == free.scores.keys()
    assert answer.scores["question_mean_nll"] == pytest.approx(free.scores["question_mean_nll"])
    assert answer.risk_name == "sum_nll"
    assert answer.p_correct == pytest.approx(lm.calibration.p_correct({"sum_nll": first.nll}))
    stream = lm.stream(QUESTION, max_tokens=6, stop=stop, raw=raw)
    assert [*stream] == []
    assert stream.answer.scores == answer.scores


def test_a_stop_text_of_several_tokens_is_an_end_with_all_of_their_surprisal():
    lm = calibrated()
    free = lm.generate(QUESTION, max_tokens=6)
    count = max(n for n, t in enumerate(free.tokens[:3], 1) if t.text)  # the last may be a part of a character
    stop = "".join(t.text for t in free.tokens[:count])
    answer = lm.generate(QUESTION, max_tokens=6, stop=[stop])
    assert answer.tokens == ()
    assert answer.scores["sum_nll"] == pytest.approx(math.fsum(t.nll for t in free.tokens[:count]))
    assert count > 1


def test_the_end_does_not_count_where_there_are_words():
    lm = calibrated()
    free = lm.generate(QUESTION, max_tokens=6)
    last = next(t for t in free.tokens[1:] if t.id != free.tokens[0].id)
    answer = lm.generate(QUESTION, max_tokens=6, stop=[last.id])
    assert answer.tokens
    assert answer.scores["sum_nll"] == pytest.approx(math.fsum(t.nll for t in answer.tokens))


def test_candidates_without_words_are_ranked_by_their_end():
    lm = calibrated()
    firsts = [lm.generate(QUESTION, temperature=1.0, seed=i, max_tokens=1).tokens[0] for i in range(6)]
    found = lm.candidates(QUESTION, 6, max_tokens=3, stop=[firsts[0].id, firsts[3].id])
    assert any(not a.tokens for a in found)
    assert [a.risk for a in found] == sorted(a.risk for a in found)
    assert all("sum_nll" in a.scores for a in found)
