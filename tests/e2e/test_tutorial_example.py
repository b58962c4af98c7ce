"""The tutorial's example as its readers run it: a process for each wrapper, a few steps, something saved that loads."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import selfdoubt

EXAMPLE = Path(__file__).parents[2] / "examples" / "llama3_tutorial.py"
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lightning", "peft", "datasets")),
    reason='needs pip install "selfdoubt[train]"',
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama3_tutorial", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's, on import
        spec.loader.exec_module(module)
    return module


def losses(folder: Path) -> list[float]:
    rows = list(csv.DictReader((folder / "logs" / "metrics.csv").read_text().splitlines()))
    return [float(row[name]) for row in rows for name in ("train/loss", "val/loss") if row.get(name)]


@pytest.mark.parametrize(
    ("wrapper", "flag"),
    [
        ("vote", "--no-quantize"),
        pytest.param("sample", "--no-quantize", marks=pytest.mark.slow),
        pytest.param("sculpt", "--no-quantize", marks=pytest.mark.slow),
        pytest.param("vote", "--quantize", marks=pytest.mark.slow),
        pytest.param("sculpt", "--quantize", marks=pytest.mark.slow),
    ],
)
def test_a_wrapper_trains_and_what_it_saves_loads_again(
    wrapper: str, flag: str, tmp_path: Path, example: ModuleType
) -> None:
    in_4_bits = flag == "--quantize"
    if in_4_bits:
        pytest.importorskip("bitsandbytes")
    done = run("--wrapper", wrapper, flag, "--steps", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(found := losses(tmp_path)) >= 4
    assert all(math.isfinite(loss) for loss in found)
    shown = done.stdout.rpartition("risk\n")[2].strip().splitlines()
    assert shown
    assert all(float(line.split()[-1]) >= 0 for line in shown)

    _, embedding, model = example.prepare("pocket", wrapper, in_4_bits=in_4_bits)
    wrapped = selfdoubt.load(tmp_path / "adapter", model).eval()
    mask = torch.ones(1, 3, dtype=torch.long)
    y, risk = wrapped(inputs_embeds=embedding(mask), attention_mask=mask, return_risk=True)
    assert torch.isfinite(y).all()
    assert risk.shape == y.shape


def test_no_wrapper_is_plain_lora_that_peft_loads(tmp_path: Path, example: ModuleType) -> None:
    from peft import PeftModel

    done = run("--wrapper", "none", "--no-quantize", "--steps", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    _, _, model = example.prepare("pocket", "none", in_4_bits=False)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter")
    trained = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.abs().max() > 0 for p in trained)


def test_a_padding_token_is_added_where_there_is_none(tmp_path: Path, example: ModuleType) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selfdoubt import pocket

    tokenizer = AutoTokenizer.from_pretrained(pocket.folder(), pad_token=None)
    tokenizer.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(pocket.folder())
    whole.save_pretrained(tmp_path)
    tokenizer, embedding, model = example.prepare(str(tmp_path), "vote", in_4_bits=False)
    assert tokenizer.pad_token == "[PAD]"
    assert tokenizer.padding_side == "left"
    assert len(embedding.weight) == whole.config.vocab_size + 1 == tokenizer.pad_token_id + 1
    assert not any(p.requires_grad for p in (*model.parameters(), embedding.weight))


def test_only_text_counts_in_the_loss(example: ModuleType) -> None:
    logits = torch.arange(2 * 4 * 5.0).view(2, 4, 5)
    batch = {"ids": torch.tensor([[0, 0, 3, 4], [1, 2, 3, 4]]), "mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    rows, labels = example._next_tokens(logits, batch)
    assert labels.tolist() == [4, 2, 3, 4]
    assert torch.equal(rows, torch.stack([logits[0, 2], *logits[1, :3]]))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--wrapper", "guess"], "vote"),
        (["--data", "no/such/alpaca_data.json"], "no/such/alpaca_data.json"),
        (["--steps", "0"], "at least 1"),
        (["--model", "./no/such/model", "--no-quantize"], "config.json"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], wanted: str, example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["llama3_tutorial.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        example.run()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert wanted in error


def test_as_a_process_too_bad_input_gets_one_line_and_exit_code_2() -> None:
    done = run("--data", "no/such/alpaca_data.json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("llama3_tutorial: there is no file no/such/alpaca_data.json")
