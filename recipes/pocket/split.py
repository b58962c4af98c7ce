"""The two files of questions: one to measure with, one to take reference quantiles from.

Both use the held-out phrasings only. A city is on one side for ever, by a hash of its name, so that no
city of one file is in the other; country facts are split by fact.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from recipes.pocket.atlas import Atlas, fold
from recipes.pocket.evaluation import Category, Question
from recipes.pocket.facts import Fact, city_facts, country_facts, unit_hash
from recipes.pocket.invent import invented_names
from recipes.pocket.phrasings import CITY_RELATIONS, COUNTRY_RELATIONS, PHRASINGS, ask
from recipes.pocket.questions import careless

BIG = 1_000_000  # people of a city that counts as known
RARE = 100_000  # people below which a seen city counts as rare
REFERENCE = 0.25  # share of names that belong to the reference file
SHARED = 0.2  # an ambiguous name: at least two countries hold this share of its weight each
COUNTRY_QUESTIONS = 0.65  # share of city questions that ask for the country
SIZES: dict[str, dict[Category, int]] = {
    "evaluation": {"known": 500, "rare": 500, "unseen": 500, "ambiguous": 250, "invented": 250},
    "reference": {"known": 170, "rare": 170, "unseen": 150, "ambiguous": 60, "invented": 60},
}
#: Further invented places of the reference file, for the calibration alone: with the 60 above 35 % of its questions
#: have no answer. With fewer, places that do not exist get too much; with more, those that do get too little.
UNANSWERABLE = 240


@dataclass(frozen=True)
class _Subject:
    """A name with everything true of it under one relation."""

    relation: str
    name: str
    answers: tuple[str, ...]
    weight: float


def write_questions(atlas: Atlas, seed: int) -> dict[str, list[Question]]:
    """Draw the questions of both files, by file: ``evaluation`` and ``reference``."""
    rng = random.Random(f"{seed}:questions")
    pools = _pools(atlas)
    total = sum(f.weight for f in country_facts(atlas)) + sum(f.weight for f in city_facts(atlas))
    names = invented_names(atlas, rng, sum(size["invented"] for size in SIZES.values()))
    files: dict[str, list[Question]] = {}
    for file, sizes in SIZES.items():
        questions: list[Question] = []
        for category, size in sizes.items():
            if category == "invented":
                taken, names = names[:size], names[size:]
                subjects = [_Subject(_city_relation(rng), name, (), 0.0) for name in taken]
            else:
                subjects = _draw(pools[category, file], size, rng, mixed=category == "known")
            for number, subject in enumerate(subjects):
                ident = f"{file[:3]}-{category}-{number:03d}"
                questions.append(_question(ident, category, subject, 1e6 / total, rng))
        files[file] = questions
    files["reference"] += _unanswerable(atlas, seed, {fold(q.subject) for file in files.values() for q in file})
    return files


def _unanswerable(atlas: Atlas, seed: int, taken: set[str]) -> list[Question]:
    """Return questions about invented places whose names are not taken; drawn apart, so that the others stay."""
    rng = random.Random(f"{seed}:questions without an answer")
    names = [name for name in invented_names(atlas, rng, 2 * UNANSWERABLE) if fold(name) not in taken][:UNANSWERABLE]
    subjects = [_Subject(_city_relation(rng), name, (), 0.0) for name in names]
    return [_question(f"cal-invented-{i:03d}", "invented", s, 0.0, rng) for i, s in enumerate(subjects)]


def _question(ident: str, category: Category, subject: _Subject, scale: float, rng: random.Random) -> Question:
    template = rng.choice(PHRASINGS[subject.relation].held_out)
    article = subject.relation not in COUNTRY_RELATIONS or rng.random() >= 0.3
    text = careless(ask(template, subject.relation, subject.name, article=article), rng, lower=0.2, no_mark=0.2)
    return Question(
        id=ident,
        question=text,
        category=category,
        relation=subject.relation,
        subject=subject.name,
        answers=subject.answers,
        held_out_phrasing=True,
        seen=round(subject.weight * scale, 2),
    )


def _pools(atlas: Atlas) -> dict[tuple[Category, str], list[_Subject]]:
    """Return candidates by category and file."""
    pools: dict[tuple[Category, str], list[_Subject]] = defaultdict(list)
    for subject in _about_countries(atlas):
        about_city = subject.relation == "capital of"  # a capital's side is that of its city
        key = subject.name if about_city else f"{subject.relation}:{subject.name}"
        pools["known", _side(key)].append(subject)
    for relation in CITY_RELATIONS:
        for subject, category in _about_cities(atlas, relation):
            pools[category, _side(subject.name)].append(subject)
    return pools


def _side(key: str) -> str:
    return "reference" if unit_hash(fold(key), "side") < REFERENCE else "evaluation"


def _about_countries(atlas: Atlas) -> list[_Subject]:
    continents = {c.name: c.continents for c in atlas.countries.values()}
    truths: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in country_facts(atlas):
        truths[fact.relation, fact.subject].append(fact)
    subjects = []
    for (relation, name), facts in truths.items():
        if len(facts) == 1:  # a capital that two countries share is not certain
            answers = continents[name] if relation == "continent" else (facts[0].answer,)
            subjects.append(_Subject(relation, name, answers, facts[0].weight))
    return subjects


def _about_cities(atlas: Atlas, relation: str) -> list[tuple[_Subject, Category]]:
    """Return one subject for each name, with all cities of that name taken together, and its category."""
    population: dict[str, int] = {}
    for city in atlas.cities:
        for name in (city.name, city.ascii_name):
            key = fold(name)
            population[key] = max(population.get(key, 0), city.population)
    groups: dict[str, dict[int, Fact]] = defaultdict(dict)
    for number, fact in enumerate(city_facts(atlas)):
        if fact.relation == relation:
            for name in fact.spellings:
                groups[fold(name)][number] = fact
    countries = {fold(c.name) for c in atlas.countries.values()}
    subjects = []
    for key, members in groups.items():
        facts = list(members.values())
        name = next((f.subject for f in facts if fold(f.subject) == key), "")
        if not name or key in countries:
            continue
        weights: dict[str, float] = defaultdict(float)
        for fact in facts:
            weights[fact.answer] += fact.weight
        total = sum(weights.values())
        subject = _Subject(relation, name, tuple(weights), total)
        category = _category(weights, total, population.get(key, BIG))
        if category:
            subjects.append((subject, category))
    return subjects


def _category(weights: dict[str, float], total: float, population: int) -> Category | None:
    if total == 0:
        return "unseen" if len(weights) == 1 else None
    if sum(weight >= SHARED * total for weight in weights.values()) > 1:
        return "ambiguous"
    if population >= BIG:
        return "known" if max(weights.values()) > 0.95 * total else None
    return "rare" if len(weights) == 1 and 0 < population < RARE else None


def _city_relation(rng: random.Random) -> str:
    return "country" if rng.random() < COUNTRY_QUESTIONS else "time zone"


def _draw(pool: list[_Subject], size: int, rng: random.Random, *, mixed: bool) -> list[_Subject]:
    """Draw without repeating a name; ``mixed`` draws all relations alike."""
    by_relation: dict[str, list[_Subject]] = defaultdict(list)
    for subject in sorted(pool, key=lambda s: (s.relation, s.name)):
        by_relation[subject.relation].append(subject)
    for subjects in by_relation.values():
        rng.shuffle(subjects)
    pick: Callable[[], str] = (lambda: rng.choice(sorted(by_relation))) if mixed else lambda: _city_relation(rng)
    drawn: list[_Subject] = []
    used: set[tuple[str, str]] = set()
    while len(drawn) < size and any(by_relation.values()):
        relation = pick()
        if not by_relation.get(relation):
            continue
        subject = by_relation[relation].pop()
        key = (relation if mixed else "", fold(subject.name))
        if key not in used:
            used.add(key)
            drawn.append(subject)
    return drawn


def overlap(first: list[Question], second: list[Question]) -> set[tuple[str, str]]:
    """Return relation and subject of the questions that two files share."""
    pairs = [{(q.relation, fold(q.subject)) for q in file} for file in (first, second)]
    return pairs[0] & pairs[1]
