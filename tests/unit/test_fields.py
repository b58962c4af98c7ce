"""Typed reading: what each kind takes, what it says of the rest, and settings of a wrong kind as users meet them."""

from __future__ import annotations

import json
import math
from unicodedata import category

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt import fields
from selfdoubt.errors import LoadError
from selfdoubt.fields import FieldError
from tests.plain import run

#: Anything that JSON or Python may hold.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400) | st.just(object()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def named(key):
    return key != "" and not any(category(c) in ("Cc", "Cs", "Zl", "Zp") for c in key)


KINDS = {
    "number": (fields.number(), lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= 1e308),
    "share": (fields.number(0, 1), lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 1),
    "open": (
        fields.number(above=0, below=1), lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 1
    ),
    "whole": (fields.whole(1, 9), lambda v: type(v) is int and 1 <= v <= 9),
    "flag": (fields.flag, lambda v: isinstance(v, bool)),
    "text": (fields.text, lambda v: isinstance(v, str) and (v == "" or named(v))),
    "choice": (fields.choice("a", 1), lambda v: v == "a" or (type(v) is int and v == 1)),
    "optional": (fields.optional(fields.whole()), lambda v: v is None or (type(v) is int and 0 <= v <= 2**53)),
    "ascending": (
        fields.ascending,
        lambda v: isinstance(v, list) and len(v) > 0 and all(type(x) in (int, float) for x in v) and sorted(v) == v
        and all(abs(x) <= 1e308 for x in v),
    ),
    "numbers": (
        fields.table(fields.listing(fields.number())),
        lambda v: isinstance(v, dict) and all(
            named(k) and isinstance(x, list) and all(type(n) in (int, float) and abs(n) <= 1e308 for n in x)
            for k, x in v.items()
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@given(st.data())
def test_a_kind_takes_what_it_says_and_names_the_rest_in_one_line(name, data):
    kind, takes = KINDS[name]
    own = st.integers(-2, 11) | st.floats(-1, 2) | st.lists(st.integers(-9, 9)) | st.sampled_from(["a", 1, True, 1.0])
    value = data.draw(VALUES | own)
    said = ""
    try:
        kind(value, "here.it")
    except FieldError as error:
        said = str(error)
    assert "here.it" in said or not said
    assert "\n" not in said
    assert len(said) < 400
    assert bool(said) != takes(value)


def test_numbers_of_other_libraries_are_numbers():
    assert fields.whole(1, 9)(np.int64(3), "n") == 3
    assert fields.number()(np.float32(0.5), "x") == 0.5
    with pytest.raises(FieldError):
        fields.whole()(np.float64(3), "n")
    with pytest.raises(FieldError):
        fields.number()(np.float64("nan"), "x")


def test_a_table_names_what_lacks_and_what_is_too_much():
    kind = fields.record({"a": fields.flag}, {"b": fields.whole()})
    assert kind({"a": True}, "it") == {"a": True}
    with pytest.raises(FieldError, match=r"^it\.a must be there, found only \['b'\]$"):
        kind({"b": 1}, "it")
    with pytest.raises(FieldError, match=r"^it must be a table of a, b, found the key 'c'$"):
        kind({"a": True, "c": 1}, "it")


@given(st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.none()))
def test_what_json_writes_is_read(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(table))
    assert fields.read_object(path) == table


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_no_json(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps({"a": value}))
    with pytest.raises(LoadError, match=r"a\.json is broken: a number must be finite, found (NaN|Infinity); save or"):
        fields.read_object(tmp_path / "a.json")


def test_settings_of_a_wrong_kind_are_named():
    """In an interpreter of its own: the checks of types under pytest would find some of this first."""
    code = """
from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import ConfigError
for make, name, values in (
    (vote.Wrapper, "n_voters", (True, 2.0, "3", None, [3], 10**30)),
    (vote.Wrapper, "rank", (True, 2.5, "16")),
    (vote.Wrapper, "alpha", (True, "1", None, 1e308, -1e308, float("nan"), 10**400, 1j)),
    (vote.Wrapper, "weight_noise", (False, "x", 1e300)),
    (vote.Wrapper, "finetune", (1, None, "yes")),
    (vote.Wrapper, "output", ("logit", None, 1)),
    (vote.Wrapper, "param_filter", ("(", 3, b"a", ["q_proj"])),
    (vote.Wrapper, "shared_inputs", ("mask", [[1, 2]], (1,), ("",), None)),
    (vote.Wrapper, "symbolic_trace", (0, 1, "yes")),
    (vote.Wrapper, "compile", (0, 1, "yes")),
    (vote.Wrapper, "verbose", (True, 3, -1, "1")),
    (vote.Wrapper, "seed", (True, 0.0, 2**60, None)),
    (sample.Wrapper, "n_samples", (True, 2.0, "3", 10**30)),
    (sample.Wrapper, "output", ("x",)),
    (sample.Bernoulli, "p", (True, "0.1", 0, 1, 2, None)),
    (sample.Bernoulli, "trainable", (1, None)),
    (sample.Normal, "std", (True, "0.1", 0, 1e308, None)),
    (sculpt.Wrapper, "n_layers", (True, 2.0, 10**9)),
    (sculpt.Wrapper, "rank", (True, 10**9)),
    (sculpt.Wrapper, "initial_scale", (True, "1", 1e308)),
):
    for value in values:
        try:
            print("TAKEN", make, name, make(**{name: value}))
        except ConfigError as error:
            said = str(error)
            assert said.startswith(name) and " must be " in said and "; try " + name + "=" in said, said
            assert len(said.splitlines()) == 1 and len(said) < 300, said
vote.Wrapper(shared_inputs=["mask"]), vote.Wrapper(n_voters=1, alpha=1, rank=None)
print("done")
"""
    assert run(code).splitlines() == ["done"]
