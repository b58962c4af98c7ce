"""The code speaks plain English in the field's words, and a name has one home: see ``tests/meta/language.py``."""

from __future__ import annotations

import ast

import pytest

from tests.meta import language

FILES = language.python_files()
TOP = language.ROOT.parents[1]
PYTHON = [
    p for room in ("src", "recipes", "benchmarks", "examples", "tests") for p in sorted((TOP / room).rglob("*.py"))
]
#: Names that are a part of a stored or a served format: they stay as they are written.
STORED_WORDS = {"withhold", "withheld"}
#: A command and the function that it calls; a distribution of two wrappers (the tutorial's names).
HOMONYMS = {"calibrate", "evaluate", "fit", "prepare", "Normal"}


def parse(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_docstrings_start_with_a_verb_or_a_noun(name):
    assert language.noun_clauses(parse(name)) == []
    assert language.verbless(parse(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_words_are_the_fields_own(name):
    hits = language.banned(FILES[name].read_text(encoding="utf-8"))
    assert [hit for hit in hits if hit[1].lower() not in STORED_WORDS] == []


@pytest.mark.parametrize("name", FILES)
def test_variables_say_what_they_hold(name):
    assert language.variables(parse(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_private_names_stay_at_home(name):
    assert language.private_uses(parse(name)) == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(TOP)))
def test_every_name_is_defined(path):
    assert language.undefined_names(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_a_public_name_has_one_home():
    found = {name: homes for name, homes in language.homonyms(FILES).items() if name not in HOMONYMS}
    assert found == {}
    assert all(len(homes) == 2 for homes in language.homonyms(FILES).values())


def test_no_module_imports_itself_in_a_circle():
    assert language.circles(FILES) == []


@pytest.mark.parametrize(
    ("source", "check"),
    [
        ('def f():\n    """Whether it holds."""\n', language.noun_clauses),
        ('def f():\n    """The sum."""\n', language.verbless),
        ("found = 1\n", language.variables),
        ("def f(plan): ...\n", language.variables),
        ("def f():\n    return defined_nowhere\n", language.undefined_names),
        ("from selfdoubt.risk import _share\n", language.private_uses),
        ("from selfdoubt import risk\nrisk._share(1)\n", language.private_uses),
    ],
)
def test_each_check_finds_what_it_looks_for(source, check):
    assert len(check(ast.parse(source))) == 1


def test_banned_words_are_found_in_any_case():
    assert language.banned("#: Nobody told it.\n") == [(1, "Nobody"), (1, "told")]


def test_circles_and_homonyms_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("from selfdoubt import b\n\ndef load(): ...\n")
    (tmp_path / "b.py").write_text("def load():\n    from selfdoubt.a import load\n")
    files = {"a": tmp_path / "a.py", "b": tmp_path / "b.py"}
    assert language.circles(files) == [["a", "b"]]
    assert language.homonyms(files) == {"load": ["a", "b"]}
