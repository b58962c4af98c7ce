"""``selfdoubt export`` as its users run it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdoubt import pocket, sample, vote
from selfdoubt.lm.adapters.adapter import save_adapter
from selfdoubt.lm.adapters.lora import add_lora
from selfdoubt.lm.load import load_model
from tests.e2e.test_cli import QUESTION, in_process, run

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """LoRA under sampling noise for the pocket model, as training would leave it."""
    model = add_lora(load_model("pocket", device="cpu")[0], r=4)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    extra = {"reference": {"sum_nll": [0.0, 1.0, 50.0]}}
    return save_adapter(
        sample.Wrapper(n_samples=3)(model), tmp_path_factory.mktemp("noisy"), base="pocket", extra=extra
    )


def test_voters_of_the_pocket_model_become_peft_adapters(tmp_path):
    out = tmp_path / "voters"
    done = run("export", str(pocket.voters_folder()), str(out), "--peft")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(out / f"voter-{m}") for m in range(3)]
    base = load_model("pocket", dtype="float32", device="cpu")[0]
    from selfdoubt import RiskAwareLM

    wrapped = RiskAwareLM.load("pocket", dtype="float32", device="cpu").model
    ids = torch.tensor([[5, 77, 300, 12]])
    with torch.no_grad():
        for m, expected in enumerate(wrapped.forecast(input_ids=ids)["logits"].members):
            voter = load_with_peft(base, out / f"voter-{m}")
            torch.testing.assert_close(voter(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def load_with_peft(base, folder):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def test_a_merged_model_answers_through_the_command_line(tmp_path, noisy):
    out = tmp_path / "merged"
    done = run("export", str(noisy), str(out), "--merge", "--dtype", "float32")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(out), str(out / "adapter")]

    def answer(*arguments: str) -> dict[str, Any]:
        done = run("ask", QUESTION, "--json", "--max-tokens", "8", "--dtype", "float32", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    before = answer("--adapter", str(noisy))
    after = answer("--model", str(out), "--adapter", str(out / "adapter"))
    assert after["text"] == before["text"]
    assert after["scores"] == pytest.approx(before["scores"], rel=1e-3, abs=1e-4)
    assert after["percentile"] == pytest.approx(before["percentile"])


def test_lora_alone_goes_with_any_wrapper(tmp_path, noisy, monkeypatch, capsys):
    out = tmp_path / "lora"
    assert in_process(monkeypatch, "export", str(noisy), str(out), "--peft") == 0
    assert capsys.readouterr().out.split() == [str(out)]
    for wrapper in ("auto", "none", "vote:n_voters=2,rank=2"):
        arguments = ("ask", "hi", "--adapter", str(out), "--wrapper", wrapper, "--max-tokens", "2")
        assert in_process(monkeypatch, *arguments) == 0


def test_large_adapters_are_said_to_be_large(tmp_path, monkeypatch, capsys):
    wrapped = vote.Wrapper(n_voters=2, param_filter=r"\.0\..*v_proj")(load_model("pocket", device="cpu")[0])
    adapter = save_adapter(wrapped, tmp_path / "adapter", base="pocket")
    assert in_process(monkeypatch, "export", str(adapter), str(tmp_path / "out"), "--peft") == 0
    error = capsys.readouterr().err
    assert error.startswith("selfdoubt: full deviations become LoRA of rank 128")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "Missing argument"),
        (["VOTERS"], "Missing argument"),
        (["VOTERS", "OUT"], "--peft"),
        (["VOTERS", "OUT", "--peft", "--merge"], "one of them"),
        (["VOTERS", "OUT", "--merge"], "no LoRA to merge"),
        (["./no/such/adapter", "OUT", "--peft"], "selfdoubt.json"),
        (["FULL", "OUT", "--peft"], "selfdoubt.json"),
        (["VOTERS", "FULL", "--peft"], "is not empty"),
        (["VOTERS", "FILE", "--peft"], "is a file"),
        (["VOTERS", "FILE/below", "--peft"], "cannot be written"),
        (["VOTERS", "VOTERS", "--peft"], "is not empty"),
        (["VOTERS", "OUT", "--peft", "--model", "./no/such/model"], "no model folder"),
        (["VOTERS", "OUT", "--peft", "--model", "no-such-name-on-the-hub"], "hub"),
        (["VOTERS", "OUT", "--peft", "--push", "me"], "user/name"),
        (["VOTERS", "OUT", "--peft", "--push", "me/voters"], "HF_TOKEN"),
        (["NOISY", "OUT", "--merge", "--dtype", "int7"], "bfloat16"),
        (["NOISY", "OUT", "--merge", "--model", "OTHER"], "another base model"),
        (["VOTERS", "OUT", "--peft", "--model", "OTHER"], "does not fit"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, wanted, tmp_path, noisy, model_folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    capsys.readouterr()
    places = {"VOTERS": pocket.voters_folder(), "NOISY": noisy, "OTHER": model_folder}
    places |= {name: tmp_path / name.lower() for name in ("FULL", "FILE", "OUT")}
    for name, place in places.items():
        arguments = [a.replace(name, str(place)) if a.split("/")[0] == name else a for a in arguments]
    assert in_process(monkeypatch, "export", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdoubt: ")
    assert error.count("\n") == 1
    assert wanted in error
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_upload_that_fails_keeps_what_was_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    out = tmp_path / "out"
    arguments = ("export", str(pocket.voters_folder()), str(out), "--peft", "--push", "me/voters")
    assert in_process(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "uploading it to me/voters failed" in error
    assert error.count("\n") == 1
    assert (out / "voter-2" / "adapter_config.json").is_file()
