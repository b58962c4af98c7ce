"""``run.json`` as this version and others write it."""

from __future__ import annotations

import json

import pytest

from selfdoubt.errors import DataError
from selfdoubt.eval.settings import Cost, Run

PROMISE = {"target_accuracy": 0.9, "confidence": 0.95}


def test_a_new_run_writes_its_settings_and_nothing_that_is_not_known():
    run = Run(model="pocket", seed=3, judge="exact", costs={"answer": Cost(1.0, 2.5)})
    assert json.dumps(run.to_json()) == (
        '{"model": "pocket", "adapter": null, "wrapper": null, "dtype": null, "quantize": null, "risk": null, '
        '"data": null, "task": null, "seed": 3, "judge": "exact", "costs": {"answer": {"passes": 1.0, "seconds": 2.5}}}'
    )


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"task": None, "model": "m", "of_a_later_version": {"a": [1, None]}, "seed": 0},
        {"costs": {"answer": {"passes": 1, "seconds": 2.0}}, "threshold": 0.5, "promise": PROMISE, "gone": None},
    ],
)
def test_a_run_is_written_back_as_it_was_read(entries):
    run = Run.parse(entries)
    assert json.dumps(run.to_json()) == json.dumps(entries)
    assert Run.parse(run.to_json()) == run


def test_a_guarantee_takes_the_place_of_an_earlier_one():
    run = Run.parse({"threshold": 0.5, "promise": {"target_accuracy": 0.8}, "model": "m"})
    assert run.with_guarantee(0.7, PROMISE).to_json() == {"model": "m", "threshold": 0.7, "promise": PROMISE}
    assert run.with_guarantee(None, None).to_json() == {"model": "m"}


@pytest.mark.parametrize(
    "entries", [{"seed": "three"}, {"seed": True}, {"threshold": "high"}, {"costs": {"answer": 3}}, {"model": 5}]
)
def test_a_setting_of_another_kind_is_named(entries):
    with pytest.raises(DataError, match=f"{next(iter(entries))}.* must be"):
        Run.parse(entries)
