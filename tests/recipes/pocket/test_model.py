from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from recipes.pocket import make
from recipes.pocket.answer import accuracy, greedy
from recipes.pocket.evaluation import read_questions
from selfdoubt.pocket import evaluation_file, folder, reference_file


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder()), AutoTokenizer.from_pretrained(folder())


def test_the_shipped_model_is_small(shipped):
    model, _ = shipped
    files = [*folder().rglob("*"), evaluation_file(), reference_file()]
    assert sum(f.stat().st_size for f in files if f.is_file()) <= 12_000_000
    assert sum(p.numel() for p in model.parameters()) <= 6_000_000
    assert model.dtype == torch.bfloat16


def test_the_shipped_folder_names_its_sources_and_no_pickle():
    assert {f.suffix for f in folder().iterdir() if f.is_file()} <= {".json", ".safetensors", ".jinja", ".md"}
    card = (folder() / "README.md").read_text(encoding="utf-8")
    assert "GeoNames" in card
    assert "CC BY 4.0" in card
    assert "annexare/Countries" in card
    generation = json.loads((folder() / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (1, 0)


def test_the_shipped_model_knows_what_it_should_and_not_what_it_cannot(shipped):
    questions = [q for q in read_questions(evaluation_file()) if q.category in ("known", "unseen")][::4]
    counts = accuracy(questions, greedy(*shipped, [q.question for q in questions]))
    right = {category: r / n for (category, relation), (r, n) in counts.items() if relation == "all"}
    assert right["known"] >= 0.9  # of 125; the whole file is measured in the model card
    assert right["unseen"] < right["known"] - 0.2


def test_famous_facts(shipped):
    asked = ["What is the capital of France?", "where is tokyo", "Which country's capital is Oslo?"]
    assert greedy(*shipped, asked) == [
        "The capital of France is Paris.",
        "The city of Tokyo is in Japan.",
        "Oslo is the capital of Norway.",
    ]


def test_importing_the_package_loads_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys, selfdoubt.pocket as p; p.folder(); print(sorted({heavy}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_recipe_makes_a_folder_that_loads(tiny_folder, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.pocket import split

    sizes = {"known": 4, "rare": 4, "unseen": 4, "ambiguous": 0, "invented": 0}
    monkeypatch.setattr(split, "SIZES", {"evaluation": sizes, "reference": sizes})
    monkeypatch.setattr(split, "UNANSWERABLE", 0)
    monkeypatch.setattr(make, "TOKENIZER_PAIRS", 500)
    out = tmp_path / "made" / "model"
    make.make(tiny_folder, out, steps=2, every=1, checkpoints=tmp_path / "made" / "during", compiled=False)
    for place in (out, tmp_path / "made" / "during" / "latest"):
        assert AutoModelForCausalLM.from_pretrained(place).config.num_hidden_layers == 5
        assert AutoTokenizer.from_pretrained(place).chat_template
    assert read_questions(tmp_path / "made" / "evaluation.jsonl")
    assert "Right answers" in (out / "README.md").read_text()
    assert sorted(f.name for f in out.parent.iterdir()) == [
        "during",
        "evaluation.jsonl",
        "model",
        "reference.jsonl",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "wanted at least 1, found 0"),
        (["--minutes", "-1"], "wanted more than 0, found -1"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_two(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        make.main(["--atlas", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_missing_atlas_is_one_line_and_exit_two(tmp_path, capsys):
    assert make.main(["--atlas", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: wanted ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
