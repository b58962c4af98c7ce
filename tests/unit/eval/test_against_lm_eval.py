"""TruthfulQA's MC1 and MC2 are those of lm-evaluation-harness, on the same model, question by question."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import transformers

from selfdoubt import RiskAwareLM
from selfdoubt.data import question_sets
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.generate import ask_batch
from selfdoubt.eval.prompts import Prompting
from selfdoubt.eval.records import Question
from selfdoubt.eval.scores.agreement import build_equivalence
from tests import oracles
from tests.zoo import talker, tokenizer

ROWS = [
    ("What do cats eat?", ["Cats eat meat"], ["Cats eat stones", "Cats eat light"]),
    ("Is the sky green?", ["No, it is blue", "It is not"], ["Yes", "It is green on Mondays"]),
    ("How many legs has a spider?", ["Eight", "A spider has eight legs", "8"], ["Six", "A spider has ten legs"]),
    ("Who wrote this?", ["Nobody knows"], ["A king", "Two kings", "Three kings", "Four kings"]),
    ("Where is north?", ["It depends on where you stand", "Towards the pole"], ["Up"]),
]


@pytest.fixture
def words():
    """A tokenizer that puts nothing before a text: the harness adds no beginning of text unless told."""
    found = copy.deepcopy(tokenizer())
    found.bos_token = None
    return found


@pytest.fixture
def model():
    own = copy.deepcopy(talker().config)
    own.max_position_embeddings = 1024
    longer = transformers.AutoModelForCausalLM.from_config(own, dtype=talker().dtype)
    longer.load_state_dict(talker().state_dict())
    return longer.eval()


def targets(right, wrong):
    return {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}


@pytest.fixture
def task_files(tmp_path):
    """The same questions in the layout of the hub, which the harness reads, and in that of the official file."""
    hub = [{"question": q, "mc1_targets": targets(r[:1], w), "mc2_targets": targets(r, w)} for q, r, w in ROWS]
    (tmp_path / "hub.json").write_text(json.dumps(hub))
    official = [
        {
            "question": q,
            "mc1_targets": {r[0]: 1, **dict.fromkeys(w, 0)},
            "mc2_targets": {**dict.fromkeys(r, 1), **dict.fromkeys(w, 0)},
        }
        for q, r, w in ROWS
    ]
    (tmp_path / "mc_task.json").write_text(json.dumps(official))
    return tmp_path


def harness(task_files, model, words, kind):
    """What the harness says of each question, and what it asked."""
    huggingface, evaluator = oracles.load("lm_eval.models.huggingface"), oracles.load("lm_eval.evaluator")
    tasks = Path(oracles.load("lm_eval.tasks").__file__).parent
    config = oracles.load("lm_eval.tasks._yaml_loader").load_yaml(tasks / "truthfulqa" / f"truthfulqa_{kind}.yaml")
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(task_files / "hub.json")}},
    }
    config.pop("tag", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = huggingface.HFLM(pretrained=model, tokenizer=words, batch_size=2, max_length=1024)
        task = oracles.load("lm_eval.api.task").ConfigurableTask(config=config)
        found = evaluator.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][f"truthfulqa_{kind}"], key=lambda s: s["doc_id"])
    return [s["acc"] for s in samples], [s["arguments"][0][0] for s in samples]


@pytest.mark.parametrize("kind", ["mc1", "mc2"])
def test_multiple_choice_against_lm_evaluation_harness(task_files, model, words, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected, asked = harness(task_files, model, words, kind)
    examples = re.findall(r"Q: (.*)\nA: (.*)", asked[0])
    shots = tuple(Question(str(i), q, answers=(a,)) for i, (q, a) in enumerate(examples))
    questions = question_sets.load_questions(task_files / "mc_task.json", task=kind)
    plan = EvaluationConfig(how=Prompting("qa"), shots=shots, batch_size=2)
    assert [plan.prompt(q) for q in questions] == asked
    found = ask_batch(RiskAwareLM(model, words), questions, plan, build_equivalence("exact")).records
    assert len(set(expected)) > 1  # or it would prove little
    for record, theirs in zip(found, expected, strict=True):
        ours = float(record.correct) if kind == "mc1" else record.grade
        assert ours == pytest.approx(float(theirs), abs=1e-6)
