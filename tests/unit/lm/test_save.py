"""A language model that is saved whole answers as before, and nothing of it is dropped in silence."""

from __future__ import annotations

import gc
import hashlib
import pickle
from pathlib import Path

import pytest

import selfdoubt
from selfdoubt import RiskAwareLM, sample, storage, vote
from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.lm import model as lm_model
from selfdoubt.lm.adapters.lora import add_lora
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.conditions import Origin
from selfdoubt.lm.load import load_model
from selfdoubt.lm.scores import reference_quantiles
from tests.zoo import talker, tokenizer

QUESTIONS = ["What is the capital of France?", "In which country is Tartu?", "Hi"]
REFERENCE = {"sum_nll": [0.0, 50.0, 1000.0], "question_mean_nll": [0.0, 5.0, 100.0], "rank_nll": [0.0, 0.3, 1.0]}
HEAD = Calibration("isotonic", ("sum_nll",), knots=((0.0, 0.9), (1000.0, 0.1)), threshold=0.5)


def summary(lm):
    answers = lm.generate(QUESTIONS, max_tokens=5)
    return [(a.text, a.risk, a.percentile, a.p_correct, a.abstain, [t.risk for t in a.tokens]) for a in answers]


@pytest.mark.parametrize("name", ["vote", "sample", "lora", "vote-on-lora", "plain"])
def test_save_and_load_give_the_same_answers(name, tmp_path):
    folder = tmp_path / "base"
    talker().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    base = RiskAwareLM.load(folder, wrapper=None)
    model = base.model
    if "lora" in name:
        add_lora(model, r=2)
    if "vote" in name:
        model = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5)(model)
    if name == "sample":
        model = sample.Wrapper(n_samples=2)(model)
    lm = RiskAwareLM(model.eval(), base.tokenizer, reference=REFERENCE, calibration=HEAD)
    first = summary(lm)
    assert None not in (first[0][2], first[0][3])

    again = RiskAwareLM.load(adapter=lm.save(tmp_path / "saved"))
    assert summary(again) == first
    assert (again.reference, again.calibration) == (REFERENCE, HEAD)
    assert again.save(tmp_path / "twice").joinpath("selfdoubt.json").is_file()


def test_a_saved_tokenizer_is_the_one_that_loads(tmp_path):
    folder = tmp_path / "base"
    talker().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    lm = RiskAwareLM.load(folder, wrapper=None)
    lm.tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}!{% endfor %}"
    lm.reference = reference_quantiles(lm.generate(QUESTIONS, max_tokens=3))
    again = RiskAwareLM.load(folder, adapter=lm.save(tmp_path / "saved"))
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template
    assert summary(again) == summary(lm)


def test_a_model_without_anything_added_is_not_saved(tmp_path):
    with pytest.raises(WrapError, match="not wrapped, so there is nothing to save"):
        RiskAwareLM(talker(), tokenizer()).save(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("learnt", "named"),
    [({"reference": REFERENCE}, "a reference, "), ({"calibration": HEAD}, "a calibration, "),
     ({"reference": REFERENCE, "calibration": HEAD}, "a calibration and a reference, ")],
)  # fmt: skip
def test_saving_the_bare_model_drops_nothing_in_silence(learnt, named, tmp_path):
    lm = RiskAwareLM(vote.Wrapper(n_voters=2, rank=2)(talker()), tokenizer(), **learnt)
    with pytest.raises(ConfigError, match=rf"has {named}.* would drop; save all of it with lm\.save\(folder\)"):
        selfdoubt.save(lm.model, tmp_path / "dropped")
    assert not (tmp_path / "dropped").exists()
    selfdoubt.save(lm, tmp_path / "whole")
    manifest = storage.read_manifest(tmp_path / "whole")
    assert set(learnt) <= set(manifest)
    selfdoubt.save(lm.model, tmp_path / "explicit", extra={"reference": None, "calibration": None})
    model = lm.model
    del lm
    gc.collect()
    selfdoubt.save(model, tmp_path / "alone")  # the language model is gone, and its reference with it


def test_a_manifest_is_read_once_and_each_file_hashed_once_per_load(monkeypatch, tmp_path):
    folder = tmp_path / "base"
    talker().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    base = RiskAwareLM.load(folder, wrapper=None)
    lm = RiskAwareLM(vote.Wrapper(n_voters=2, rank=2)(base.model).eval(), base.tokenizer, calibration=HEAD)
    saved = lm.save(tmp_path / "saved")
    reads, hashed, hashed_before_the_base = [], [], []

    def counting_open(path, *args, **kwargs):
        reads.append(Path(path).name)
        return path_open(path, *args, **kwargs)

    def counting_digest(file, *args):
        hashed.append(Path(file.name).name)
        return file_digest(file, *args)

    def noting_load(*args, **kwargs):
        hashed_before_the_base.extend(hashed)
        return load_model(*args, **kwargs)

    path_open, file_digest = Path.open, hashlib.file_digest
    monkeypatch.setattr(Path, "open", counting_open)
    monkeypatch.setattr(hashlib, "file_digest", counting_digest)
    monkeypatch.setattr(lm_model, "load_model", noting_load)
    RiskAwareLM.load(adapter=saved)
    assert reads.count("selfdoubt.json") == 1
    assert hashed.count("added.safetensors") == hashed_before_the_base.count("added.safetensors") == 1
    assert len(hashed) == len(set(hashed))


def test_a_front_travels_and_knows_all_but_the_weights():
    lm = RiskAwareLM(talker(), tokenizer(), reference=REFERENCE, calibration=HEAD, layers=(1,))
    front = pickle.loads(pickle.dumps(lm.front))
    assert not any("model" in name for name in vars(front))
    assert (front.reference, front.calibration, front.layers) == (REFERENCE, HEAD, (1,))
    assert (front.stop_ids, front.context, front.vocabulary) == (lm.stop_ids, lm.front.context, lm.front.vocabulary)
    answer = lm.generate(QUESTIONS[0], max_tokens=3)
    scored = front.scorer.score(
        answer.tokens, answer.question, answer.finish, answer.text, answer.states, origin=Origin("greedy")
    )
    assert (scored.risk, scored.percentile) == (answer.risk, answer.percentile)
    assert scored.scores == {name: value for name, value in answer.scores.items() if "rauq" not in name}  # no attention
