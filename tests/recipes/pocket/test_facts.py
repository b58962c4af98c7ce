from __future__ import annotations

import random

from recipes.pocket.atlas import fold
from recipes.pocket.facts import HELD_OUT, SMALL, all_facts, never_seen, spellings
from recipes.pocket.phrasings import PHRASINGS, sentence
from recipes.pocket.questions import pair_stream, sample_pairs


def facts_of(atlas, relation, subject):
    return [f for f in all_facts(atlas) if f.relation == relation and f.subject == subject]


def test_lists_keep_their_order_and_empty_ones_are_no_fact(tiny):
    assert facts_of(tiny, "languages", "Switzerland")[0].answer == "German, French and Italian"
    assert [f.relation for f in all_facts(tiny) if f.subject == "Antarctica"] == ["continent", "calling code"]


def test_a_shared_name_is_weighed_by_each_city(tiny):
    weights = {f.answer: f.weight for f in facts_of(tiny, "country", "Paris")}
    assert weights["France"] > 5 * weights["Switzerland"] > 0


def test_about_a_fifth_of_the_small_cities_is_never_seen(tiny):
    hidden = never_seen(tiny)
    assert 0.1 < len(hidden) / 200 < 0.3
    assert not hidden & {1, 2, 3, 4}
    assert 5 not in hidden, "shares its name with a city that is seen"
    assert all(f.weight == 0 for f in all_facts(tiny) if f.subject == f"Dorf{min(hidden) - 100}")


def test_the_same_seed_draws_the_same_pairs(tiny):
    assert sample_pairs(tiny, 3, 500) == sample_pairs(tiny, 3, 500)
    assert sample_pairs(tiny, 3, 500) != sample_pairs(tiny, 4, 500)


def test_pairs_are_right_and_careless(tiny):
    truths = {sentence(f.relation, name, f.answer) for f in all_facts(tiny) for name in f.spellings}
    pairs = sample_pairs(tiny, 0, 3000)
    assert {p.answer for p in pairs} <= truths
    assert {p.relation for p in pairs} == set(PHRASINGS)
    lower = sum(p.question.islower() for p in pairs) / len(pairs)
    marked = sum(p.question.endswith("?") for p in pairs) / len(pairs)
    assert 0.2 < lower < 0.35  # 3,000 draws at 0.27: eight standard deviations
    assert 0.4 < marked < 0.8


def test_training_never_uses_a_held_out_phrasing(tiny):
    asked = {fold(p.question).rstrip("?.") for p in sample_pairs(tiny, 0, 20_000)}
    for fact in all_facts(tiny):
        for template in PHRASINGS[fact.relation].held_out:
            for subject in (fact.subject, f"the {fact.subject}"):
                assert fold(template.format(s=subject)).rstrip("?.") not in asked


def test_the_whole_atlas_hides_a_fifth_of_the_small_cities(whole):
    hidden = never_seen(whole)
    small = [c for c in whole.cities if c.population < SMALL]
    assert abs(len(hidden) / len(small) - HELD_OUT) < 0.02
    names = {fold(n) for c in whole.cities if c.id in hidden for n in spellings(c)}
    stream = pair_stream(all_facts(whole), random.Random(1))
    about_cities = (p for p in (next(stream) for _ in range(50_000)) if p.relation in ("country", "time zone"))
    assert not names & {fold(p.subject) for p in about_cities}
