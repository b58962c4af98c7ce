"""What the chat page shows: tokens, plots and words as HTML, in which nothing that anybody wrote becomes markup."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.lm.answer import Alternative, Answer, Token
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.risk_levels import BOUNDS, find_risk_level
from selfdoubt.serve.chat import examples, phrases, tokens_html
from selfdoubt.serve.chat.conversation import Attempt, ChatSettings, Turn
from selfdoubt.serve.chat.page import get_display_name, is_pocket
from selfdoubt.serve.chat.plot import render_risk_plot
from selfdoubt.serve.chat.turn_html import TurnView

EVIL = "</span><script>alert(1)</script><img src=x onerror='x'>\"&amp;`${1}{{2}}"
texts = st.text(max_size=20) | st.sampled_from(["", "\n", EVIL, " ", "<b>", "**a**", "\u202e", "'\""])
nats = st.floats(0, 20, allow_nan=False)


def token(text="Paris", nll=0.3, total=0.4, epistemic=0.1, others=()):
    return Token(text, 7, -nll, total, total - epistemic, epistemic, 1 / 3, 0.01, None, nll, tuple(others))


def made(parts):
    """Tokens of what ``raw`` drew: a type checker that draws at random may not run inside of a strategy."""
    return [
        token(text, nll, total, share * total, [Alternative(t, i, p) for i, (t, p) in enumerate(others)])
        for text, nll, total, share, others in parts
    ]


raw = st.tuples(texts, nats, nats, st.floats(0, 1), st.lists(st.tuples(texts, st.floats(0, 1)), max_size=3))


class Reader(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self):
        super().__init__()
        self.elements, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def answer(found=(), p_correct=0.87, percentile=0.93, abstain=False, finish="stop", text=None, risk=1.0):
    text = "".join(t.text for t in found) if text is None else text
    return Answer(text, tuple(found), (), {"sum_nll": risk}, risk, "sum_nll", percentile, finish, p_correct, abstain)


def turn(answers, state="done", **settings):
    mode, before = settings.pop("mode", "once"), settings.pop("before", ())
    asked = Turn(1, settings.pop("question", "Where?"), mode, ChatSettings(**settings), before, needed_confidence=0.5)
    asked.attempts, asked.state = [Attempt(i, list(a.tokens), a) for i, a in enumerate(answers)], state
    return asked


@given(st.lists(raw, max_size=5))
def test_a_token_is_one_element_whose_text_and_numbers_are_its_own(parts):
    found = made(parts)
    reader = read(tokens_html.render_tokens(found))
    assert [tag for tag, _ in reader.elements] == ["span"] * len(found)
    assert reader.text == "".join(t.text for t in found)
    for (_, attributes), own, number in zip(reader.elements, found, range(99), strict=False):
        logprob, total, epistemic, aleatoric, disagreement, risk, rank, others = json.loads(attributes["data-d"])
        close = [own.logprob, own.total, own.epistemic, own.aleatoric, own.disagreement, own.risk]
        assert [logprob, total, epistemic, aleatoric, disagreement, risk] == pytest.approx(close, rel=1e-3)
        assert rank == find_risk_level(own.risk)
        assert attributes["class"].split()[:2] == ["t", f"t{rank}"]
        assert [o[0] for o in others] == [o.text for o in own.alternatives]
        assert attributes["data-k"] == str(number)
        assert (attributes["tabindex"] == "0") == (number == 0)
        assert {n for n in attributes if n.startswith("on")} == set()


@pytest.mark.parametrize("i", range(5))
def test_a_token_has_the_colour_of_its_level_and_says_so_to_who_cannot_see_it(i):
    risk = [*BOUNDS, 9.0][i]
    (_, attributes), *_ = read(tokens_html.render_token(token(nll=risk), 0)).elements
    assert attributes["class"] == f"t t{i}"
    assert (
        attributes["aria-label"]
        == f"Paris: probability {phrases.format_share(math.exp(-risk))}, {phrases.LEVEL_NAMES[i]}"
    )


def test_the_alternatives_say_which_of_them_was_chosen():
    own = token(others=[Alternative("Paris", 7, 0.7), Alternative("Lyon", 8, 0.2)])
    (_, attributes), *_ = read(tokens_html.render_token(own, 0)).elements
    assert json.loads(attributes["data-d"])[-1] == [["Paris", 0.7, True], ["Lyon", 0.2, False]]


def test_a_part_of_a_character_is_there_without_letters():
    (_, attributes), *_ = read(tokens_html.render_token(token(""), 3)).elements
    assert "part" in attributes["class"].split()
    assert attributes["aria-label"].startswith("no letter: ")


@given(texts, texts, st.lists(raw, max_size=4))
def test_a_question_keeps_its_text_whatever_is_known_of_its_tokens(text, before, parts):
    assert read(tokens_html.render_question(text, made(parts))).text.strip() == text.strip()
    text = before + "".join(part[0] for part in parts)
    assert read(tokens_html.render_question(text, made(parts))).text.strip() == text.strip()


def test_words_of_a_question_without_a_number_stand_before_the_coloured_ones():
    html = tokens_html.render_question("Where is it?", [token(" is", nll=4.0), token(" it?")])
    reader = read(html)
    assert reader.text == "Where is it?"
    assert [a["class"] for _, a in reader.elements] == ["t t3", "t t1"]  # surprisal counts a quarter


def test_of_a_chat_without_a_template_only_the_last_words_are_the_question():
    reader = read(tokens_html.render_question("Then she", [token("Hi."), token("\n"), token("Then"), token(" she")]))
    assert reader.text == "Then she"
    assert len(reader.elements) == 2


@given(st.lists(raw, max_size=9), st.sampled_from([1, 20]))
def test_a_plot_is_well_formed_and_within_its_frame(parts, times):
    found = made(parts) * times
    svg = render_risk_plot(found, "say0")
    tree = ElementTree.fromstring(svg)
    paths = tree.findall(".//path")
    for path in paths:
        numbers = (
            path.get("d").replace("M", " ").replace("V", " ").replace("h", " ").replace("v", " ").replace("z", " ")
        )
        assert all(-100 <= float(n) <= max(100, len(found)) for n in numbers.split())
    bars = sum(p.get("d").count("M") for p in paths if "bar" in p.get("class"))
    assert bars == len(found)
    lines = (len(found) > 0) + any(t.epistemic for t in found)
    assert len([p for p in paths if "line" in p.get("class")]) == lines


def test_a_plot_draws_each_bar_at_its_height_in_the_colour_of_its_level():
    found = [token(nll=0.0, total=0.0, epistemic=0.0), token(nll=2.0, total=3.0, epistemic=1.5)]
    paths = {p.get("class"): p.get("d") for p in ElementTree.fromstring(render_risk_plot(found)).findall(".//path")}
    assert set(paths) == {"bar b0", "bar b4", "line total", "line epistemic"}
    assert "v-66.7" in paths["bar b4"]  # of 3 nats
    assert paths["line total"] == "M0 100.0h1V0.0h1"
    assert paths["line epistemic"] == "M0 100.0h1V50.0h1"


def test_a_plot_of_one_member_has_no_epistemic_part():
    drawn = render_risk_plot([token(epistemic=0.0), token(epistemic=0.0)])
    assert "epistemic" not in drawn
    assert "epistemic" in render_risk_plot([token(epistemic=0.0), token(epistemic=0.1)])


def test_a_plot_tells_in_words_where_doubt_was_highest():
    said = ElementTree.fromstring(render_risk_plot([token(nll=0.1), token(nll=2.0, total=1.0)])).find(".//svg")
    assert said.get("aria-label") == (
        "Risk along the answer: 2 tokens, the highest 2.00 nats at token 2, "
        "total doubt up to 1.00, epistemic up to 0.10"
    )


def test_a_verdict_says_p_correct_then_the_percentile_then_the_threshold():
    calibration = Calibration("isotonic", ("sum_nll",), knots=((0, 1),), threshold=0.9)
    assert phrases.describe_answer(answer(abstain=True), calibration) == [
        "Right with 87 %",
        "riskier than 93 % of the reference answers",
        "the calibrated threshold of 90 % would abstain",
    ]
    assert phrases.describe_answer(answer(p_correct=None, abstain=None, finish="length"), None) == [
        "Riskier than 93 % of the reference answers",
        "cut at max tokens",
    ]
    bare = phrases.describe_answer(answer(p_correct=None, abstain=None, percentile=None, risk=2.5), None)
    assert bare == ["Risk 2.50 (sum_nll), with nothing to compare it with"]


NOTE = "the text is far from <b>what</b> was seen"


@pytest.mark.parametrize("mode", ["once", "until", "candidates"])
def test_where_the_chance_is_not_known_the_reason_stands_in_its_place_and_nothing_is_sure_enough(mode):
    unknown = replace(answer([token()], p_correct=None, abstain=True), p_correct_note=NOTE)
    parts = TurnView(turn([unknown], mode=mode)).draw().places
    verdict = read(parts["verdict0"]).text
    assert verdict.startswith(f"Chance of being right not known here: {NOTE}")
    assert "riskier than 93 %" in verdict
    assert "gauge" not in parts["verdict0"]
    assert "Right with" not in parts["verdict0"]
    assert NOTE in phrases.describe_aloud(turn([unknown], mode=mode), None)
    assert not turn([unknown], mode="until").is_confident
    hidden = turn([unknown], mode=mode, at_least=0.01)
    assert hidden.is_hidden
    assert NOTE in phrases.explain_abstention(hidden)
    known = answer([token()], p_correct=0.01)
    assert turn([unknown, known], mode="candidates").ranked[0].answer == known


def test_a_chance_with_a_caveat_has_both():
    said = phrases.describe_answer(replace(answer(), p_correct_note=NOTE), None)
    assert said[0] == f"Right with 87 % ({NOTE})"


@given(st.floats(0, 1))
def test_only_what_is_certain_is_called_so(share):
    said = phrases.format_share(share)
    assert (said == "100 %") == (share == 1)
    assert (said == "0 %") == (share == 0)


def test_the_legend_tells_probabilities_for_surprisal_and_nats_for_the_rest():
    assert phrases.describe_levels("nll")[1] == ("nearly sure", "over 78 %")
    assert phrases.describe_levels("total")[1] == ("nearly sure", "up to 0.25")
    assert "over 95 %" in read(tokens_html.render_legend(phrases.describe_levels("nll"))).text


@given(st.lists(raw, min_size=1, max_size=6), texts)
def test_what_grows_is_only_added_to(parts, question):
    found = made(parts)
    growing = turn([], state="running", question=question)
    view = TurnView(growing)
    growing.attempts = [Attempt(0)]
    before = ""
    for own in found:
        growing.attempts[0].tokens.append(own)
        shown = view.draw().places["say0"]
        assert shown.startswith(before)
        before = shown
    growing.attempts[0].answer, growing.state = answer(found), "done"
    assert view.draw().places["say0"].startswith(before)


@given(raw, texts)
def test_nothing_that_anybody_wrote_becomes_an_element(part, question):
    (own,) = made([part])
    found = answer([replace(own, text=own.text + EVIL)], text=own.text + EVIL + EVIL)
    shown = TurnView(turn([found], question=question + EVIL)).draw()
    reader = read(shown.frame + "".join(shown.places.values()))
    assert {tag for tag, _ in reader.elements} <= {
        *("h2", "div", "p", "span", "strong", "i", "b", "em", "svg", "path", "figure", "figcaption", "button"),
    }
    assert {n for _, a in reader.elements for n in a if n.startswith("on")} == set()
    copy = next(a for _, a in reader.elements if a.get("data-do") == "copy")
    assert copy["data-text"] == own.text + EVIL + EVIL


@pytest.mark.parametrize("mode", ["once", "until", "candidates"])
def test_what_is_hidden_is_not_sent(mode):
    found = [answer([token("SECRET")], p_correct=0.7), answer([token("SECRET")], p_correct=0.6)]
    for state in ("running", "done", "stopped"):
        asked = turn(found[: 1 + (mode != "once")], state=state, at_least=0.8, mode=mode)
        assert "SECRET" not in json.dumps(TurnView(asked).draw().to_json())
    asked.revealed = True
    assert "SECRET" in json.dumps(TurnView(asked).draw().to_json())


def test_while_nothing_may_be_seen_the_count_of_tokens_and_the_plot_are():
    asked = turn([], state="running", at_least=0.5)
    asked.attempts = [Attempt(0, [token("a"), token("b")])]
    parts = TurnView(asked).draw().places
    assert "Thinking: 2 tokens so far" in parts["status"]
    assert "2 tokens" in parts["plot"]
    assert "say0" not in parts


def test_a_withheld_answer_says_why_and_offers_to_be_shown():
    parts = TurnView(turn([answer([token()], p_correct=0.7)], at_least=0.8)).draw().places
    assert "I&#x27;m not sure." in parts["unsure"]
    assert "What it would say is right with 70 %, and you ask for at least 80 %." in parts["unsure"]
    assert 'data-act="reveal">Show anyway<' in parts["tools"]
    assert 'data-do="copy"' not in parts["tools"]


def test_candidates_stand_the_least_doubtful_first():
    found = [answer([token(f"c{i}")], p_correct=p) for i, p in enumerate((0.4, 0.9, 0.6))]
    shown = TurnView(turn(found, mode="candidates")).draw()
    places = [shown.frame.index(f'"say{i}"') for i in (1, 2, 0)]
    assert places == sorted(places)
    assert "3 answers, drawn at temperature 1, the least doubtful first" in shown.places["status"]


def test_where_a_chance_promises_too_much_that_is_said():
    sure = answer(p_correct=0.9)
    assert phrases.describe_attempts(turn([sure], mode="until")) == "Sure enough after 1 try"
    several = turn([answer(p_correct=0.1), sure], mode="until")
    assert phrases.describe_attempts(several) == "Sure enough after 2 tries; the best of several promises too much"
    assert "the best of several promises too much" in phrases.describe_aloud(several, None)
    assert phrases.warn_conversation(several, sure) == ""
    bare = answer(p_correct=None, abstain=None, percentile=None)
    assert phrases.describe_candidates(turn([sure, sure], mode="candidates")).endswith(
        "first; the best of several promises too much"
    )
    assert phrases.describe_candidates(turn([bare, bare], mode="candidates")).endswith("first")
    later = turn([sure], before=({"role": "user", "content": "Before"},))
    assert "single questions" in TurnView(later).draw().places["verdict0"]
    assert "single questions" in phrases.describe_aloud(later, None)
    assert phrases.warn_conversation(later, bare) == ""


def test_examples_are_buttons_with_their_text_as_text():
    reader = read(examples.render_examples((examples.ExampleQuestion(EVIL, EVIL, EVIL),)))
    assert [tag for tag, _ in reader.elements] == ["button", "b", "span", "small"]
    assert reader.elements[0][1]["data-ask"] == EVIL
    assert reader.text == EVIL * 3


def test_a_model_is_called_by_its_name_also_where_its_weights_are_elsewhere(pocket, talker):
    for front in (pocket.front, pickle.loads(pickle.dumps(pocket.front))):
        assert is_pocket(front)
        assert get_display_name(front) == "pocket"
    assert not is_pocket(talker.front)
    assert get_display_name(talker.front) == "a model"
