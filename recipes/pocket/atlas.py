"""Records of the public atlas files, plain and frozen.

The files and their homes:

* ``cities15000.txt``: inside ``cities15000.zip`` at https://download.geonames.org/export/dump/
  (GeoNames, CC BY 4.0).
* ``countries.min.json``, ``continents.min.json``, ``languages.all.min.json``: in the folder ``dist/`` of
  https://github.com/annexare/Countries (MIT).
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdoubt.errors import SelfdoubtError

CITIES = "cities15000.txt"
COUNTRIES = "countries.min.json"
CONTINENTS = "continents.min.json"
LANGUAGES = "languages.all.min.json"
HOMES = {
    CITIES: "https://download.geonames.org/export/dump/cities15000.zip",
    COUNTRIES: "https://github.com/annexare/Countries (dist/)",
    CONTINENTS: "https://github.com/annexare/Countries (dist/)",
    LANGUAGES: "https://github.com/annexare/Countries (dist/)",
}

# ISO 4217 lists units of account and next-day funds next to the money people hold and pay with.
FUND_CODES = frozenset(
    {"BOV", "CHE", "CHW", "CLF", "COU", "MXV", "USN", "USS", "UYI", "UYW", "XBA", "XBB", "XBC", "XBD", "XDR"}
)


class AtlasError(SelfdoubtError, ValueError):
    """An atlas file is missing or is not what it should be."""


@dataclass(frozen=True)
class Country:
    """One country; lists keep the order of the file."""

    code: str
    name: str
    capital: str  # empty where the file has none
    continents: tuple[str, ...]  # the main one first
    currencies: tuple[str, ...]  # ISO 4217 codes without fund codes
    languages: tuple[str, ...]
    calling_codes: tuple[str, ...]


@dataclass(frozen=True)
class City:
    """One city of over 15,000 people."""

    id: int
    name: str
    ascii_name: str
    alternates: tuple[str, ...]
    country: str  # the country's code
    population: int
    time_zone: str
    seat: bool  # GeoNames calls it the seat of a country's government


@dataclass(frozen=True)
class Atlas:
    """All that the pocket model learns from."""

    countries: dict[str, Country]
    cities: tuple[City, ...]


def without_accents(text: str) -> str:
    """Return the text without accents, in its own case."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def fold(text: str) -> str:
    """Return the text without case and accents, words separated by one space, to compare names.

    Example:
        >>> fold("  São Paulo ")
        'sao paulo'
    """
    return " ".join(without_accents(text.casefold()).split())


def read_atlas(folder: str | Path) -> Atlas:
    """Read the four atlas files of a folder.

    Raises:
        AtlasError: If a file is missing or malformed; the message names file, line and public home.
    """
    root = Path(folder)
    continents = _json(root / CONTINENTS)
    languages = _json(root / LANGUAGES)
    countries = {
        code: _country(code, record, continents, languages) for code, record in _json(root / COUNTRIES).items()
    }
    return Atlas(countries, _cities(root / CITIES, countries))


def _text(path: Path) -> str:
    if not path.is_file():
        raise AtlasError(f"wanted {path.name} in {path.parent}, found none; get it from {HOMES[path.name]}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AtlasError(f"{path}: wanted UTF-8, found {error.reason} at byte {error.start}; get it again") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise AtlasError(f"{path}: wanted JSON, found {error}; get it from {HOMES[path.name]}") from None
    if not isinstance(table, dict):
        kind = type(table).__name__
        raise AtlasError(f"{path}: wanted an object by code, found a {kind}; get it from {HOMES[path.name]}")
    return table


def _country(code: str, record: Any, continents: dict[str, Any], languages: dict[str, Any]) -> Country:
    try:
        main = record["continent"]
        every = [main, *(c for c in record.get("continents", []) if c != main)]
        return Country(
            code=code,
            name=record["name"],
            capital=record["capital"],
            continents=tuple(continents[c] for c in every),
            currencies=tuple(c for c in record["currency"] if c not in FUND_CODES),
            languages=tuple(languages[c]["name"] for c in record["languages"]),
            calling_codes=tuple(f"+{c}" for c in record["phone"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        keys = "name, capital, continent, currency, languages, phone"
        raise AtlasError(
            f"{COUNTRIES}, country {code}: wanted {keys} with known codes, found no {error}; "
            f"get the files of one release from {HOMES[COUNTRIES]}"
        ) from None


def _cities(path: Path, countries: dict[str, Country]) -> tuple[City, ...]:
    cities = []
    for number, row in enumerate(_text(path).split("\n"), 1):
        if not row:
            continue
        cells = row.rstrip("\r").split("\t")
        if len(cells) != 19:
            raise AtlasError(
                f"{path}, line {number}: wanted 19 tab-separated cells, found {len(cells)}; get it from {HOMES[CITIES]}"
            )
        if cells[8] not in countries:
            raise AtlasError(
                f"{path}, line {number}: wanted a country code of {COUNTRIES}, found {cells[8]!r}; get both files again"
            )
        try:
            ident, population = int(cells[0]), int(cells[14])
        except ValueError as error:
            raise AtlasError(
                f"{path}, line {number}: wanted whole numbers for id and population, found {error}; "
                f"get it from {HOMES[CITIES]}"
            ) from None
        cities.append(
            City(
                id=ident,
                name=cells[1],
                ascii_name=cells[2],
                alternates=tuple(name for name in cells[3].split(",") if name),
                country=cells[8],
                population=population,
                time_zone=cells[17],
                seat=cells[7] == "PPLC",
            )
        )
    if not cities:
        raise AtlasError(f"{path}: wanted cities, found an empty file; get it from {HOMES[CITIES]}")
    return tuple(cities)
