"""Training on real data from the command line: the pocket model on its own facts, and a larger shape on Alpaca."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.pocket import evaluation
from selfdoubt import RiskAwareLM, pocket
from tests.e2e.test_cli import run

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.slow


def need(file: Path) -> Path:
    if not file.exists():
        pytest.skip(f"{file.name} is not beside this checkout")
    return file


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> Path:
    """Pairs as the pocket model learnt them, in training phrasings."""
    from recipes.pocket import atlas
    from recipes.pocket.facts import all_facts
    from recipes.pocket.questions import pair_stream

    stream = pair_stream(all_facts(atlas.read_atlas(need(SHARED / "atlas"))), random.Random(1))
    file = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    lines = (json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in islice(stream, 4000))
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("wrapper", ["vote", "sample", "sculpt", "none"])
def test_the_pocket_model_keeps_its_facts_in_held_out_phrasings(facts, tmp_path, wrapper):
    """The base has 99.6 % of them: fine-tuning with the default settings of each wrapper may not cost more than 3 %."""
    out = tmp_path / "adapter"
    done = run(
        "train", "--data", str(facts), "--out", str(out), "--wrapper", wrapper, "--accelerator", "cpu", "--max-steps",
        "100", "--batch-size", "36", "--loggers", "none", "--no-progress",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lm = RiskAwareLM.load("pocket", adapter=out)
    questions = [q for q in evaluation.read_questions(pocket.evaluation_file()) if q.category == "known"]
    answers = lm.generate([q.question for q in questions], max_tokens=48, batch_size=64)
    right = sum(evaluation.is_right(q, a.text) for q, a in zip(questions, answers, strict=True)) / len(questions)
    training = json.loads((out / "selfdoubt.json").read_text())["training"]
    print(f"{wrapper}: {right:.3f} of known facts in held-out phrasings, val/loss {training['val_loss']:.4f}")
    assert right >= 0.965
    assert all(a.percentile is not None for a in answers)


@pytest.mark.parametrize("wrapper", ["vote", "none"])
def test_a_model_of_135_million_parameters_learns_from_alpaca(tmp_path, wrapper):
    """Random weights of SmolLM2's shape with the pocket's tokenizer: 20 steps on real records, and the loss falls."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    data = need(SHARED / "alpaca" / "alpaca_data.json")
    words = AutoTokenizer.from_pretrained(pocket.folder())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, eos_token_id=words.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    settings = {
        "model": tmp_path / "model", "data": data, "out": tmp_path / "adapter", "wrapper": wrapper, "limit": 400,
        "max-steps": 20, "batch-size": 6, "max-length": 128, "accelerator": "cpu", "lr": 2e-3, "loggers": "none",
        "reference": 2, "reference-tokens": 4, "loss-on": "all",
    }  # fmt: skip
    done = run("train", "--no-progress", *(text for k, v in settings.items() for text in (f"--{k}", str(v))))
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "adapter" / "selfdoubt.json").read_text())["training"]["losses"]
    print(f"{wrapper}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_workers_over_an_epoch_of_alpaca(tmp_path, workers):
    """Each worker's own memory (USS) after the first batches and after all 52,002 examples: texts stay in mapped files.

    A Python list of the same texts would be copied page by page as its reference counts change: tens of MB a worker.
    """
    import copy
    import os

    from selfdoubt.lm.load import load_model
    from selfdoubt.train import InstructionData, TrainConfig
    from selfdoubt.train.encode import prepare_splits

    data = need(SHARED / "alpaca" / "alpaca_data.json")
    _, words = load_model("pocket")
    config = TrainConfig(data=str(data), out="", batch_size=12, workers=workers, val_share=0)
    found = prepare_splits(config, copy.deepcopy(words), tmp_path)
    assert len(found.train) + found.empty == 52_002
    assert 28 <= found.empty < 60  # 28 without a response, and some whose question fills the length

    def own_memory() -> int:
        pids = [w.pid for w in iterator._workers]
        return max(
            sum(int(line.split()[1]) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                if line.startswith(("Private_Clean", "Private_Dirty")))
            for pid in pids if os.path.exists(f"/proc/{pid}")
        )  # fmt: skip

    iterator: Any = iter(InstructionData(found, config).train_dataloader())
    seen, early = 0, 0
    for number, batch in enumerate(iterator):
        seen += len(batch.ids)
        if number == 300:
            early = own_memory()
        if number == 4200:
            late = own_memory()
    print(f"{workers} workers: {early / 1024:.1f} MB each after 300 batches, {late / 1024:.1f} MB after 4,200")
    assert seen >= len(found.train) - 12
    assert late < early + 12 * 1024  # kB
