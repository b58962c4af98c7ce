"""What the shipped calibration says of places that the model knows, half knows, and of such that do not exist."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from recipes.pocket import voters
from recipes.pocket.evaluation import is_right, read_questions, save_questions
from selfdoubt import RiskAwareLM, pocket
from selfdoubt.pocket import evaluation_file, reference_file
from selfdoubt.storage import read_manifest


def test_places_that_do_not_exist_are_withheld_and_known_ones_are_given():
    lm = RiskAwareLM.load("pocket", dtype=torch.float32)
    threshold = lm.calibration.threshold
    assert lm.calibration.promise["target_accuracy"] == 0.9
    assert lm.calibration.conditions is not None
    assert lm.front.misfit is None
    for name in ("Zorbelheim", "Qwxyzk", "Tartu"):  # the last is real, and the model is wrong about it
        assert lm.generate(f"In which country is {name}?").p_correct < threshold - 0.15
    famous = ["What is the capital of Japan?", "Where is Tokyo?", "What is the currency of France?"]
    assert all(a.p_correct > 0.9 for a in lm.generate(famous))
    questions = [q for q in read_questions(evaluation_file()) if q.id.endswith("5")]
    answers = lm.generate([q.question for q in questions], max_tokens=48, batch_size=64)

    def mean_p(category):
        found = [a.p_correct or 0.0 for q, a in zip(questions, answers, strict=True) if q.category == category]
        return sum(found) / len(found)

    assert mean_p("known") > 0.85
    assert mean_p("invented") < 0.35 < threshold - 0.2
    given = [is_right(q, a.text) for q, a in zip(questions, answers, strict=True) if not a.abstain]
    assert len(given) > 0.4 * len(questions)
    assert sum(given) >= 0.9 * len(given)


def test_the_voters_are_trained_by_fit_and_written_with_their_calibration(tiny_folder, tmp_path, monkeypatch, capsys):
    """Two steps on four countries: no good voters, but an adapter of the same kind as the one that ships."""
    every = read_questions(reference_file())
    few = tmp_path / "few.jsonl"
    save_questions(few, every[::3])
    monkeypatch.setattr(pocket, "reference_file", lambda: few)
    out = tmp_path / "voters"
    assert voters.main(["--atlas", str(tiny_folder), "--out", str(out), "--steps", "2"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["added.safetensors", "selfdoubt.json"]
    made, shipped = (read_manifest(folder) for folder in (out, pocket.voters_folder()))
    known = [{key: entry[key] for key in old} for entry, old in zip(made["wrappers"], shipped["wrappers"], strict=True)]
    assert known == shipped["wrappers"]  # which were written before newer settings, and mean their defaults
    fingerprints = [manifest["base"].pop("fingerprint") for manifest in (made, shipped)]
    assert made["base"] == shipped["base"]
    # Earlier ones have vectors only, without alignments.
    assert all(fingerprints[0][name][:2] == numbers[:2] for name, numbers in fingerprints[1].items())
    assert made["reference"].keys() >= shipped["reference"].keys()
    made_tensors, shipped_tensors = (load_file(f / "added.safetensors") for f in (out, pocket.voters_folder()))
    assert {n: (t.shape, t.dtype) for n, t in made_tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in shipped_tensors.items()
    }
    answer = RiskAwareLM.load("pocket", adapter=out, dtype=torch.float32).generate("What is the capital of France?")
    assert 0 <= answer.percentile <= 1
    assert 0 <= answer.p_correct <= 1


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--steps", "0"], "wanted at least 1, found 0"), ([], "wanted the folder with the four")]
)
def test_bad_arguments_of_the_voters_exit_with_two(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        voters.main(["--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
