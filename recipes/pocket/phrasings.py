"""Phrasings of questions: per relation some to train on, two more to test on, and one answer sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasings:
    """Templates of one relation; ``{s}`` is the subject, ``{a}`` the answer."""

    sentence: str
    training: tuple[str, ...]
    held_out: tuple[str, str]


PHRASINGS: dict[str, Phrasings] = {
    "capital": Phrasings(
        "The capital of {s} is {a}.",
        (
            "What is the capital of {s}?",
            "What's the capital of {s}?",
            "What is the capital city of {s}?",
            "Which city is the capital of {s}?",
            "Tell me the capital of {s}.",
            "Name the capital of {s}.",
            "{s} has which capital?",
            "Capital of {s}?",
            "What city is the capital of {s}?",
            "What is the name of the capital of {s}?",
            "What is {s}'s capital?",
            "Do you know what the capital of {s} is?",
            "I want to know what the capital of {s} is.",
        ),
        ("Can you tell me what the capital of {s} is?", "Which city is {s}'s capital?"),
    ),
    "continent": Phrasings(
        "{s} is in {a}.",
        (
            "Which continent is {s} in?",
            "On which continent is {s}?",
            "What continent is {s} on?",
            "On what continent does {s} lie?",
            "What is the continent of {s}?",
            "{s} is on which continent?",
            "Tell me the continent of {s}.",
            "Continent of {s}?",
            "{s} belongs to which continent?",
            "What is {s}'s continent?",
            "Do you know which continent {s} is in?",
        ),
        ("What continent does {s} belong to?", "Can you tell me which continent {s} is on?"),
    ),
    "currency": Phrasings(
        "In {s} people pay with {a}.",
        (
            "What is the currency of {s}?",
            "What's the currency of {s}?",
            "Which currency is used in {s}?",
            "What currency do people use in {s}?",
            "Which currency does {s} use?",
            "Tell me the currency of {s}.",
            "What money do people use in {s}?",
            "Currency of {s}?",
            "{s} uses which currency?",
            "How do people pay in {s}?",
            "What is {s}'s currency?",
            "What do people pay with in {s}?",
            "Do you know which currency {s} uses?",
        ),
        ("What currency does {s} have?", "Which money do people pay with in {s}?"),
    ),
    "languages": Phrasings(
        "In {s} people speak {a}.",
        (
            "Which languages are spoken in {s}?",
            "What languages are spoken in {s}?",
            "What is the language of {s}?",
            "What language do people speak in {s}?",
            "Which languages do people speak in {s}?",
            "Tell me the languages of {s}.",
            "What are the languages of {s}?",
            "Languages of {s}?",
            "What do people speak in {s}?",
            "What language is spoken in {s}?",
            "What is {s}'s language?",
            "Do you know what languages are spoken in {s}?",
        ),
        ("Which language is spoken in {s}?", "Can you tell me what languages people speak in {s}?"),
    ),
    "calling code": Phrasings(
        "The calling code of {s} is {a}.",
        (
            "What is the calling code of {s}?",
            "What's the calling code of {s}?",
            "Which calling code does {s} have?",
            "What is the phone code of {s}?",
            "What is the dialling code for {s}?",
            "Tell me the calling code of {s}.",
            "Calling code of {s}?",
            "What code do I dial to call {s}?",
            "Which phone code does {s} use?",
            "What is the country code for calling {s}?",
            "What is {s}'s calling code?",
            "Do you know the calling code of {s}?",
        ),
        ("What calling code does {s} use?", "Which code do I dial to call {s}?"),
    ),
    "capital of": Phrasings(
        "{s} is the capital of {a}.",
        (
            "{s} is the capital of which country?",
            "Which country has the capital {s}?",
            "What country is {s} the capital of?",
            "Of which country is {s} the capital?",
            "{s} is the capital of what country?",
            "What country has {s} as its capital?",
            "Tell me which country has the capital {s}.",
            "Whose capital is {s}?",
            "Do you know which country {s} is the capital of?",
        ),
        ("Which country is {s} the capital of?", "Which country's capital is {s}?"),
    ),
    "country": Phrasings(
        "The city of {s} is in {a}.",
        (
            "In which country is {s}?",
            "Where is {s}?",
            "What country is {s} in?",
            "Which country is the city of {s} in?",
            "Where is the city of {s}?",
            "Where's {s}?",
            "{s} is in which country?",
            "In what country does {s} lie?",
            "Tell me the country of {s}.",
            "Country of {s}?",
            "Tell me where {s} is.",
            "The city of {s} belongs to which country?",
            "Do you know where {s} is?",
            "Do you know which country {s} is in?",
        ),
        ("Which country is {s} in?", "In what country is the city of {s}?"),
    ),
    "time zone": Phrasings(
        "The time zone of {s} is {a}.",
        (
            "What is the time zone of {s}?",
            "What's the time zone of {s}?",
            "Which time zone is {s} in?",
            "What time zone does {s} use?",
            "In which time zone is {s}?",
            "Tell me the time zone of {s}.",
            "Time zone of {s}?",
            "Which time zone does the city of {s} use?",
            "{s} is in which time zone?",
            "What is {s}'s time zone?",
            "Do you know what the time zone of {s} is?",
        ),
        ("What time zone is {s} in?", "Which time zone does {s} use?"),
    ),
}

COUNTRY_RELATIONS = ("capital", "continent", "currency", "languages", "calling code")
CITY_RELATIONS = ("country", "time zone")

# Countries whose English name takes an article inside a sentence.
_WITH_ARTICLE = frozenset(
    {
        "Bahamas",
        "British Indian Ocean Territory",
        "British Virgin Islands",
        "Cayman Islands",
        "Central African Republic",
        "Cocos (Keeling) Islands",
        "Cook Islands",
        "Czech Republic",
        "Democratic Republic of the Congo",
        "Dominican Republic",
        "Falkland Islands",
        "Faroe Islands",
        "French Southern Territories",
        "Gambia",
        "Heard Island and McDonald Islands",
        "Isle of Man",
        "Ivory Coast",
        "Maldives",
        "Marshall Islands",
        "Netherlands",
        "Northern Mariana Islands",
        "Philippines",
        "Pitcairn Islands",
        "Republic of the Congo",
        "Seychelles",
        "Solomon Islands",
        "Turks and Caicos Islands",
        "U.S. Minor Outlying Islands",
        "U.S. Virgin Islands",
        "United Arab Emirates",
        "United Kingdom",
        "United States",
    }
)


def with_article(country: str) -> str:
    """Return the name of a country as it stands inside a sentence.

    Example:
        >>> with_article("Netherlands"), with_article("France")
        ('the Netherlands', 'France')
    """
    return f"the {country}" if country in _WITH_ARTICLE else country


def sentence(relation: str, subject: str, answer: str) -> str:
    """Return the one sentence that answers a question of this relation.

    Example:
        >>> sentence("country", "Amsterdam", "Netherlands")
        'The city of Amsterdam is in the Netherlands.'
    """
    if relation in COUNTRY_RELATIONS:
        subject = with_article(subject)
    if relation in ("country", "capital of"):
        answer = with_article(answer)
    text = PHRASINGS[relation].sentence.format(s=subject, a=answer.removesuffix("."))  # "Washington D.C."
    return _upper_first(text)


def ask(template: str, relation: str, subject: str, *, article: bool = True) -> str:
    """Return a question from one template; ``article`` puts "the" before the countries that want one."""
    if article and relation in COUNTRY_RELATIONS:
        subject = with_article(subject)
    return _upper_first(template.format(s=subject))


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]
