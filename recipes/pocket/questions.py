"""Draws question-answer pairs for training: which fact, in which phrasing, spelt how."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

from recipes.pocket.atlas import Atlas
from recipes.pocket.facts import Fact, all_facts
from recipes.pocket.phrasings import COUNTRY_RELATIONS, PHRASINGS, ask, sentence

LOWER_CASE = 0.27  # share of questions in lower case
NO_MARK = 0.3  # share of questions without the mark at their end
BARE_COUNTRY = 0.3  # share of "capital of netherlands", where "the Netherlands" is right
OTHER_SPELLING = 0.35  # share of cities in another spelling than the usual one
SMALL_TALK = 0.08  # share with a polite word before or after


@dataclass(frozen=True)
class Pair:
    """One question with its answer sentence."""

    question: str
    answer: str
    relation: str
    subject: str  # as the question spells it, in proper case


def sample_pairs(atlas: Atlas, seed: int, n: int) -> list[Pair]:
    """Draw ``n`` training pairs; the same seed gives the same pairs."""
    return list(islice(pair_stream(all_facts(atlas), random.Random(seed)), n))


def pair_stream(facts: list[Fact], rng: random.Random) -> Iterator[Pair]:
    """Draw training pairs without end, each fact by its weight, in training phrasings only."""
    seen = [f for f in facts if f.weight > 0]
    bounds = list(accumulate(f.weight for f in seen))
    while True:
        for fact in rng.choices(seen, cum_weights=bounds, k=1024):
            yield phrase(fact, rng)


def phrase(fact: Fact, rng: random.Random) -> Pair:
    """Put one fact into words, with the carelessness of people who type."""
    subject = fact.subject
    if len(fact.spellings) > 1 and rng.random() < OTHER_SPELLING:
        subject = rng.choice(fact.spellings[1:])
    template = rng.choice(PHRASINGS[fact.relation].training)
    article = fact.relation not in COUNTRY_RELATIONS or rng.random() >= BARE_COUNTRY
    question = ask(template, fact.relation, subject, article=article)
    if rng.random() < SMALL_TALK:
        question = small_talk(question, rng)
    return Pair(careless(question, rng), sentence(fact.relation, subject, fact.answer), fact.relation, subject)


def careless(question: str, rng: random.Random, *, lower: float = LOWER_CASE, no_mark: float = NO_MARK) -> str:
    """Drop capital letters or the mark at the end, now and then."""
    if rng.random() < no_mark:
        question = question.rstrip("?.")
    return question.lower() if rng.random() < lower else question


def small_talk(question: str, rng: random.Random) -> str:
    """Add a polite word."""
    body, mark = question[:-1], question[-1]
    return rng.choice(
        (
            f"Please tell me: {question}",
            f"{body}, please{mark}",
            f"Hello! {question}",
            f"Hi, {question}",
            f"Can you help me? {question}",
            f"Can you tell me this: {question}",
            f"A question: {question}",
            f"{question} Thank you!",
        )
    )
