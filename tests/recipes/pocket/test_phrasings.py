from __future__ import annotations

import pytest

from recipes.pocket.phrasings import CITY_RELATIONS, COUNTRY_RELATIONS, PHRASINGS, ask, sentence


def test_every_relation_is_there():
    assert set(PHRASINGS) == {*COUNTRY_RELATIONS, *CITY_RELATIONS, "capital of"}


@pytest.mark.parametrize("relation", PHRASINGS)
def test_at_least_six_phrasings_and_two_of_them_held_out(relation):
    phrasings = PHRASINGS[relation]
    every = [*phrasings.training, *phrasings.held_out]
    assert len(every) >= 6
    assert len(phrasings.held_out) == 2
    folded = [text.casefold().rstrip("?.") for text in every]
    assert len(set(folded)) == len(folded)
    assert all(text.count("{s}") == 1 and text[-1] in "?." for text in every)


def test_articles_stand_where_english_wants_them():
    assert ask("What is the capital of {s}?", "capital", "Netherlands") == "What is the capital of the Netherlands?"
    assert ask("{s} has which capital?", "capital", "Gambia") == "The Gambia has which capital?"
    assert ask("Capital of {s}?", "capital", "Gambia", article=False) == "Capital of Gambia?"
    assert sentence("continent", "Netherlands", "Europe") == "The Netherlands is in Europe."
    assert sentence("capital", "United States", "Washington D.C.").endswith("is Washington D.C.")
    assert sentence("capital of", "Paris", "France") == "Paris is the capital of France."
