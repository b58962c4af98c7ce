from __future__ import annotations

import pytest

from recipes.pocket import atlas
from selfdoubt.errors import SelfdoubtError


def test_reads_countries_and_cities(tiny):
    switzerland = tiny.countries["CH"]
    assert switzerland.name == "Switzerland"
    assert switzerland.languages == ("German", "French", "Italian")
    assert switzerland.calling_codes == ("+41",)
    assert tiny.cities[0] == atlas.City(
        1, "Paris", "Paris", ("Lutetia", "Parijs"), "FR", 2_138_551, "Europe/Paris", True
    )


def test_fund_codes_are_no_money(tiny):
    assert tiny.countries["CH"].currencies == ("CHF",)


def test_a_second_continent_follows_the_main_one(tiny_folder):
    file = tiny_folder / "countries.min.json"
    text = file.read_text().replace('"continent": "AN"', '"continent": "AN", "continents": ["EU", "AN"]')
    file.write_text(text)
    assert atlas.read_atlas(tiny_folder).countries["AQ"].continents == ("Antarctica", "Europe")


@pytest.mark.parametrize("name", sorted(atlas.HOMES))
def test_a_missing_file_is_named_with_its_home(tiny_folder, name):
    (tiny_folder / name).unlink()
    with pytest.raises(atlas.AtlasError, match=name) as error:
        atlas.read_atlas(tiny_folder)
    assert atlas.HOMES[name] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cities15000.txt", "1\tParis\n", "line 1.*19 tab-separated cells, found 2"),
        ("cities15000.txt", "", "found an empty file"),
        ("cities15000.txt", "\t".join(["x"] * 8 + ["FR"] + ["x"] * 10), "line 1.*whole numbers"),
        ("cities15000.txt", "\t".join(["1"] * 8 + ["ZZ"] + ["1"] * 10), "line 1.*'ZZ'"),
        ("countries.min.json", "{", "wanted JSON"),
        ("countries.min.json", "[]", "found a list"),
        ("countries.min.json", '{"FR": {"name": "France"}}', "country FR"),
        ("countries.min.json", '{"FR": 3}', "country FR"),
        ("continents.min.json", "{}", "country FR.*'EU'"),
        ("languages.all.min.json", "{}", "country FR.*'fr'"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tiny_folder, name, content, words):
    (tiny_folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(SelfdoubtError, match=words) as error:
        atlas.read_atlas(tiny_folder)
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_one_clear_line(tiny_folder):
    (tiny_folder / "cities15000.txt").write_bytes(b"1\tZ\xfcrich")
    with pytest.raises(atlas.AtlasError, match="wanted UTF-8"):
        atlas.read_atlas(tiny_folder)
