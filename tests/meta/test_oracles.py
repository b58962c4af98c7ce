"""What the tests compare with is there, in the pinned versions, and hides nothing of ours."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests import oracles

PINS = dict(line.split("==") for line in (Path(__file__).parents[1] / "oracles.txt").read_text().splitlines())


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_oracles_are_the_pinned_ones_and_no_others():
    found = {plain(d.name): d.version for d in distributions(path=[str(oracles.FOLDER)])}
    assert found == {plain(name): version for name, version in PINS.items()}, "run: make .venv/.dev"


@pytest.mark.parametrize(
    "name", ["netcal.metrics.confidence", "lm_eval.tasks", "lm_eval.evaluator", "lm_eval.tasks.truthfulqa.utils"]
)
def test_oracles_import_from_their_own_folder(name):
    module = oracles.load(name)
    assert Path(module.__file__).is_relative_to(oracles.FOLDER)
    assert sys.path.index(str(oracles.FOLDER)) > max(i for i, p in enumerate(sys.path) if p.endswith("site-packages"))


@pytest.mark.parametrize(
    "name", ["torch_uncertainty.metrics.classification.risk_coverage", "lm_polygraph.ue_metrics.pred_rej_area"]
)
def test_single_files_of_oracles_import_alone(name):
    assert Path(oracles.load_alone(name).__file__).is_relative_to(oracles.FOLDER)


def test_the_harness_finds_its_tasks_offline():
    tasks = oracles.load("lm_eval.tasks")
    folder = oracles.FOLDER / "lm_eval" / "tasks" / "truthfulqa"
    found = tasks.TaskManager(include_path=str(folder), include_defaults=False)  # all 14,000 take their time
    assert {"truthfulqa_mc1", "truthfulqa_mc2"} <= set(found.all_tasks)
