"""What a model is asked, letter by letter."""

from __future__ import annotations

import pytest

from selfdoubt.errors import ConfigError
from selfdoubt.eval.prompts import (
    BY_LETTER,
    FROM_PASSAGE,
    Prompting,
    build_prompt,
    extract_answer,
    format_example_answer,
)
from selfdoubt.eval.records import Question
from selfdoubt.lm.text.prompt import encode

FRANCE = Question("1", "What is the capital of France?", answers=("Paris", "City of Paris"))
SPAIN = Question("2", "What is the capital of Spain?", answers=("Madrid",))
PASSAGE = Question("3", "Who left?", "Ann came.\n\nBob left.", ("Bob",))
UNSAID = Question("4", "Who sang?", "Ann came.")
CHOICE = Question("5", "Which is a city?", answers=("Rome",), choices=("Red", "Rome"), right=(1,))


def build_messages(*args, **settings):
    prompt = build_prompt(*args, **settings)
    assert isinstance(prompt, list)
    return prompt


def test_a_bare_question_is_one_message_with_its_words_alone():
    assert build_prompt(FRANCE) == [{"role": "user", "content": "What is the capital of France?"}]


def test_examples_are_earlier_turns():
    assert build_prompt(SPAIN, [FRANCE]) == [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "What is the capital of Spain?"},
    ]


def test_an_instruction_is_the_systems_or_stands_before_the_first_question():
    how = Prompting(instruction="Be brief.")
    assert build_prompt(SPAIN, [FRANCE], how)[0] == {"role": "system", "content": "Be brief."}
    assert build_prompt(SPAIN, [FRANCE], how)[1:] == build_prompt(SPAIN, [FRANCE])
    inside = build_prompt(SPAIN, [FRANCE], Prompting(instruction="Be brief.", system=False))
    assert inside[0]["content"] == "Be brief.\n\nWhat is the capital of France?"
    assert inside[1:] == build_prompt(SPAIN, [FRANCE])[1:]


def test_a_passage_comes_before_its_question_and_may_hold_no_answer():
    system, asked, answered, last = build_messages(PASSAGE, [UNSAID])
    assert system == {"role": "system", "content": FROM_PASSAGE}
    assert "unanswerable" in FROM_PASSAGE
    assert asked["content"] == "Passage: Ann came.\n\nWho sang?"
    assert answered["content"] == "unanswerable"
    assert last["content"] == "Passage: Ann came.\n\nBob left.\n\nWho left?"
    assert len(build_prompt(PASSAGE, how=Prompting(instruction=""))) == 1


def test_choices_are_shown_with_letters_only_where_asked():
    assert build_prompt(CHOICE) == [{"role": "user", "content": "Which is a city?"}]
    system, user = build_messages(CHOICE, how=Prompting(options=True))
    assert system["content"] == BY_LETTER
    assert user["content"] == "Which is a city?\nA. Red\nB. Rome"
    assert format_example_answer(CHOICE, options=True) == "B. Rome"
    assert format_example_answer(CHOICE) == "Rome"


def test_plain_text_is_questions_and_answers_parted_by_empty_lines():
    how = Prompting("qa")
    assert build_prompt(SPAIN, how=how) == "Q: What is the capital of Spain?\nA:"
    assert build_prompt(SPAIN, [FRANCE, CHOICE], how) == (
        "Q: What is the capital of France?\nA: Paris\n\nQ: Which is a city?\nA: Rome\n\n"
        "Q: What is the capital of Spain?\nA:"
    )
    assert build_prompt(SPAIN, how=Prompting("qa", "Be brief.")) == "Be brief.\n\nQ: What is the capital of Spain?\nA:"
    assert build_prompt(CHOICE, how=Prompting("qa", "", options=True)) == "Q: Which is a city?\nA. Red\nB. Rome\nA:"


def test_in_plain_text_only_examples_are_parted_by_empty_lines():
    text = build_prompt(PASSAGE, [Question("6", "One\n\nor two?", answers=("a\nb",))], Prompting("qa", ""))
    assert text == "Q: One\nor two?\nA: a b\n\nPassage: Ann came.\nBob left.\nQ: Who left?\nA:"


def test_an_answer_in_plain_text_is_its_first_line():
    assert extract_answer(" Paris.\n\nQ: Next?\nA: no", Prompting("qa")) == "Paris."
    assert extract_answer("\n Paris", Prompting("qa")) == "Paris"
    assert extract_answer("  ", Prompting("qa")) == ""
    assert extract_answer(" One.\nTwo. ") == "One.\nTwo."


def test_what_cannot_be_asked_is_one_line():
    with pytest.raises(ConfigError, match="no style of prompts is called 'song'; choose one of auto, chat, qa"):
        Prompting("song")
    with pytest.raises(ConfigError, match="question 1 has 0 choices"):
        build_prompt(FRANCE, how=Prompting(options=True))
    many = Question("7", "?", choices=tuple(map(str, range(27))), right=(0,))
    with pytest.raises(ConfigError, match="27 choices"):
        build_prompt(many, how=Prompting(options=True))


def test_the_risk_of_a_question_is_that_of_its_own_words_with_examples_before_it():
    transformers = pytest.importorskip("transformers")
    from selfdoubt import pocket

    if not (pocket.folder() / "tokenizer.json").is_file():
        pytest.skip("the pocket model is not in this checkout")
    tokenizer = transformers.AutoTokenizer.from_pretrained(pocket.folder())
    encoded = encode(tokenizer, build_prompt(SPAIN, [FRANCE]))
    own = tokenizer.decode([i for i, mine in zip(encoded.ids, encoded.is_user_token, strict=True) if mine])
    assert own.strip() == SPAIN.text
