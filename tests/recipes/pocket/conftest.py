from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.pocket import atlas

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "atlas"

# id, name, ascii name, alternates, country, population, time zone, feature
CITIES = [
    (1, "Paris", "Paris", "Lutetia,Parijs", "FR", 2_138_551, "Europe/Paris", "PPLC"),
    (2, "Zürich", "Zurich", "Zuerich", "CH", 341_730, "Europe/Zurich", "PPLA"),
    (3, "Bern", "Bern", "Berne", "CH", 121_631, "Europe/Zurich", "PPLC"),
    (4, "Amsterdam", "Amsterdam", "", "NL", 741_636, "Europe/Amsterdam", "PPLC"),
    (5, "Paris", "Paris", "", "CH", 24_171, "Europe/Zurich", "PPL"),
    *((100 + i, f"Dorf{i}", f"Dorf{i}", "", "CH", 16_000 + i, "Europe/Zurich", "PPL") for i in range(200)),
]
COUNTRIES = {
    "FR": ("France", "Paris", "EU", ["EUR"], ["fr"], [33]),
    "CH": ("Switzerland", "Bern", "EU", ["CHF", "CHE", "CHW"], ["de", "fr", "it"], [41]),
    "NL": ("Netherlands", "Amsterdam", "EU", ["EUR"], ["nl"], [31]),
    "AQ": ("Antarctica", "", "AN", [], [], [672]),
}


def line(ident, name, ascii_name, alternates, country, population, zone, feature) -> str:
    cells = [str(ident), name, ascii_name, alternates, "0", "0", "P", feature, country, "", "", "", "", ""]
    return "\t".join([*cells, str(population), "", "0", zone, "2020-01-01"])


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder with four countries and a few cities, in the formats of the public files."""
    countries = {
        code: {
            "name": name,
            "native": name,
            "phone": phone,
            "continent": continent,
            "capital": capital,
            "currency": currency,
            "languages": languages,
        }
        for code, (name, capital, continent, currency, languages, phone) in COUNTRIES.items()
    }
    names = {"de": "German", "fr": "French", "it": "Italian", "nl": "Dutch"}
    languages = {code: {"name": name, "native": name} for code, name in names.items()}
    (tmp_path / "cities15000.txt").write_text("\n".join(line(*c) for c in CITIES) + "\n", encoding="utf-8")
    (tmp_path / "countries.min.json").write_text(json.dumps(countries), encoding="utf-8")
    (tmp_path / "continents.min.json").write_text('{"EU": "Europe", "AN": "Antarctica"}', encoding="utf-8")
    (tmp_path / "languages.all.min.json").write_text(json.dumps(languages), encoding="utf-8")
    return tmp_path


@pytest.fixture
def tiny(tiny_folder: Path) -> atlas.Atlas:
    return atlas.read_atlas(tiny_folder)


@pytest.fixture(scope="session")
def whole() -> atlas.Atlas:
    """The real atlas, where its folder lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the public atlas files in {SHARED}")
    return atlas.read_atlas(SHARED)
