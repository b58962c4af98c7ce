"""Runs of training and of export, and saved wrappers of small networks, as golden values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.golden import cases, gold
from tests.golden.run import selfdoubt, unpack_written

SMALL = (
    "--data", "instructions.jsonl", "--accelerator", "cpu", "--precision", "32-true", "--dtype", "float32",
    "--loggers", "none", "--no-progress", "--reference", "2", "--reference-tokens", "4", "--max-length", "48",
    "--max-steps", "3", "--batch-size", "4", "--val-share", "0.2", "--lr", "5e-5",
)  # fmt: skip
ONE_LAYER = r"layers\.1\.self_attn\.q_proj"
NOISE = ("--wrapper", "sample", "--noise", "0.1", "--n-samples", "2")
LORA = (*SMALL, *NOISE, "--lora-r", "2", "--lora-targets", ONE_LAYER)
EXTRA = {"reference": {"sum_nll": [0.0, 0.5, 2.0]}}


def save() -> dict[str, Any]:
    """Folders of wrapped networks of each kind; what was saved must load again, with the same outputs."""
    import selfdoubt as package

    unpack_written()
    x = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.5, 0.25, -0.75, 1.0]])
    found: dict[str, Any] = {}
    for name, wrapped in wrapped_mlps().items():
        if wrapped.has_members:
            wrapped.is_trained = True  # the mean answers, as in all that earlier versions have written
        folder = package.save(wrapped, name, base="an-mlp", extra=EXTRA)
        torch.manual_seed(2)
        outputs = wrapped(x, return_risk=True)
        torch.manual_seed(2)
        torch.testing.assert_close(package.load(folder, mlp())(x, return_risk=True), outputs, rtol=0, atol=0)
        torch.manual_seed(2)
        written = package.load(Path("written/mlp") / name, mlp())
        torch.testing.assert_close(written(x, return_risk=True), outputs, rtol=gold.RELATIVE, atol=gold.ABSOLUTE)
        output, risk = outputs
        found[name] = {**cases.adapter(folder), "output": output.tolist(), "risk": risk.tolist()}
    return {"save": gold.normalise(found)}


def wrapped_mlps() -> dict[str, Any]:
    """Return a small network wrapped in each way, always with the same weights."""
    from selfdoubt import sample, sculpt, vote

    wrappers = {
        "vote": vote.Wrapper(n_voters=2, rank=1),
        "vote_full": vote.Wrapper(n_voters=2, rank=None, finetune=False),
        "sample": sample.Wrapper(n_samples=3, distribution=sample.Bernoulli(0.1), param_filter=".*"),
        "sculpt": sculpt.Wrapper(),
    }
    found = {}
    for name, wrapper in wrappers.items():
        torch.manual_seed(1)
        found[name] = wrapper(mlp()).eval()
    return found


def mlp() -> nn.Module:
    """Return a small network, always with the same weights."""
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    torch.random.set_rng_state(state)
    return model.eval()


def train_voters() -> dict[str, Any]:
    """An adapter of voters, its answers, and its export to PEFT."""
    done = selfdoubt("train", *SMALL, "--out", "voters", "--n-voters", "2", "--rank", "2",
                     "--param-filter", ONE_LAYER)  # fmt: skip
    exported = selfdoubt("export", "voters", "exported", "--peft")
    return {
        **cases.command("train_voters", done, cases.adapter(Path("voters"))),
        "train_voters_card_text": gold.text(Path("voters/README.md").read_text(encoding="utf-8")),
        "train_voters_ask": _ask("voters"),
        **cases.command("train_voters_peft", exported, cases.adapter(Path("exported"))),
    }


def train_lora() -> dict[str, Any]:
    """An adapter of LoRA under sampling noise, its answers, and its exports."""
    done = selfdoubt("train", *LORA, "--out", "lora")
    peft = selfdoubt("export", "lora", "peft", "--peft")
    merged = selfdoubt("export", "lora", "merged", "--merge", "--dtype", "float32")
    return {
        **cases.command("train_lora", done, cases.adapter(Path("lora"))),
        # Two reference answers hardly differ from that of Peru: its percentile would hang on the last digits.
        "train_lora_ask": _ask("lora", "In which country is Paris?"),
        **cases.command("export_peft", peft, cases.adapter(Path("peft"))),
        **cases.command("export_merged", merged, cases.adapter(Path("merged"))),
    }


def written_adapters() -> dict[str, Any]:
    """Answers with adapters that were written earlier: of voters, and of LoRA in PEFT's format."""
    unpack_written()
    return {f"ask_written_{name}": _ask(f"written/{name}") for name in ("voters", "peft")}


def _ask(adapter: str, question: str = "What is the capital of Peru?") -> dict[str, Any]:
    options = ("--json", "--temperature", "0", "--max-tokens", "4", "--dtype", "float32")
    return selfdoubt("ask", question, "--adapter", adapter, *options).json()


CASES = (save, train_voters, train_lora, written_adapters)
