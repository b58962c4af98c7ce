"""Facts that the model learns, with weights for how often, and the cities that it never hears of.

The weights:

* A country fact (and "Paris is the capital of which country?") weighs ``COUNTRY_WEIGHT``: all are well-seen.
* A city weighs ``(population / 1e6) ** 0.7``, at least ``FLOOR`` and at most ``CEILING``; a capital at least
  ``CAPITAL_WEIGHT``. Two thirds of it go to the city's country, one third to its time zone.
* A city name that several countries share is drawn by each city's own weight: the ambiguity is real.
* A fifth of the cities below ``SMALL`` people, chosen by a hash of the name, weighs nothing: no pair has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from recipes.pocket.atlas import Atlas, City, fold, without_accents

COUNTRY_WEIGHT = 1.5
CAPITAL_WEIGHT = 1.2
FLOOR, CEILING, POWER = 0.04, 3.0, 0.7
SMALL = 200_000
HELD_OUT = 0.2
COUNTRY_SHARE = 0.65  # of a city's weight; the rest goes to its time zone

# What people type, where GeoNames' own name is longer.
_SHORT = {"New York City": "New York", "Washington": "Washington D.C.", "Frankfurt am Main": "Frankfurt"}


@dataclass(frozen=True)
class Fact:
    """One thing to know."""

    relation: str
    subject: str
    spellings: tuple[str, ...]  # the subject first
    answer: str
    weight: float  # relative to other facts; 0 for what is never seen


def unit_hash(text: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(f"{salt}:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def join_words(texts: Iterable[str]) -> str:
    """Return a list in words.

    Example:
        >>> join_words(["German", "French", "Italian"])
        'German, French and Italian'
    """
    every = list(texts)
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} and {every[-1]}"


def capitals(atlas: Atlas) -> dict[int, str]:
    """Return the capital's name in the file of countries, by the id of each city that is a country's capital."""
    by_country: dict[str, list[City]] = {}
    for city in atlas.cities:
        by_country.setdefault(city.country, []).append(city)
    names = {}
    for code, country in atlas.countries.items():
        if not country.capital:
            continue
        capital = fold(country.capital)
        same = [c for c in by_country.get(code, []) if capital in map(fold, (c.name, c.ascii_name, *c.alternates))]
        if same:
            best = max(same, key=lambda c: (c.seat, capital == fold(c.ascii_name), c.population))
            names[best.id] = country.capital
    return names


def spellings(city: City, capital: str = "") -> tuple[str, ...]:
    """Return the names a question may use, the usual one first."""
    names = (capital or city.name, city.name, city.ascii_name, _SHORT.get(city.name, city.name))
    return tuple(dict.fromkeys(names))


def never_seen(atlas: Atlas) -> frozenset[int]:
    """Return the ids of the cities that are kept out of training, under every spelling and for every relation."""
    seats = capitals(atlas)
    names = {c.id: {fold(n) for n in spellings(c, seats.get(c.id, ""))} for c in atlas.cities}
    countries = {fold(name) for c in atlas.countries.values() for name in (c.name, c.capital)}
    out = {
        c.id
        for c in atlas.cities
        if c.population < SMALL
        and not c.seat
        and c.id not in seats
        and unit_hash(fold(c.ascii_name), "never seen") < HELD_OUT
    }
    while True:
        seen = countries.union(*(names[c.id] for c in atlas.cities if c.id not in out))
        leaks = {ident for ident in out if names[ident] & seen}
        if not leaks:
            return frozenset(out)
        out -= leaks


def country_facts(atlas: Atlas) -> list[Fact]:
    """Return the facts about countries; where the files are silent there are none."""
    facts = []
    for country in atlas.countries.values():
        answers = {
            "capital": (country.capital,) if country.capital else (),
            "continent": country.continents[:1],
            "currency": country.currencies,
            "languages": country.languages,
            "calling code": country.calling_codes,
        }
        for relation, texts in answers.items():
            if texts:
                facts.append(Fact(relation, country.name, (country.name,), join_words(texts), COUNTRY_WEIGHT))
        if country.capital:
            names = tuple(dict.fromkeys((country.capital, without_accents(country.capital))))
            facts.append(Fact("capital of", country.capital, names, country.name, COUNTRY_WEIGHT))
    return facts


def city_facts(atlas: Atlas) -> list[Fact]:
    """Return country and time zone of every city, with weight 0 for the cities that are never seen."""
    hidden, seats = never_seen(atlas), capitals(atlas)
    facts = []
    for city in atlas.cities:
        weight = min(max((city.population / 1e6) ** POWER, FLOOR), CEILING)
        if city.id in seats:
            weight = max(weight, CAPITAL_WEIGHT)
        if city.id in hidden:
            weight = 0.0
        names = spellings(city, seats.get(city.id, ""))
        country = atlas.countries[city.country].name
        facts.append(Fact("country", names[0], names, country, weight * COUNTRY_SHARE))
        facts.append(Fact("time zone", names[0], names, city.time_zone, weight * (1 - COUNTRY_SHARE)))
    matched = {atlas.countries[c.country].code for c in atlas.cities if c.id in seats}
    for code, country_ in atlas.countries.items():  # capitals too small for the list of cities
        if country_.capital and code not in matched:
            name = country_.capital
            facts.append(Fact("country", name, (name,), country_.name, CAPITAL_WEIGHT * COUNTRY_SHARE))
    return facts


def all_facts(atlas: Atlas) -> list[Fact]:
    """Return every fact, seen or not."""
    return country_facts(atlas) + city_facts(atlas)
