"""``prepare``: percentiles without labels, the same result however often it was cut off, and nothing lost of others."""

from __future__ import annotations

import copy
import json
import re
import shutil

import numpy as np
import pytest

import selfdoubt
from selfdoubt import RiskAwareLM, pocket, sample, sculpt, storage, vote
from selfdoubt.data.questions import Columns, Question
from selfdoubt.errors import BaseMismatchError, ConfigError, DataError, WrapError
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.judges.verdict import Verdict
from selfdoubt.eval.settings import Run
from selfdoubt.lm.adapters.export import export_merged, export_peft
from selfdoubt.lm.scores import DEFAULT_RISK
from selfdoubt.preparation import PreparationConfig, additions, prepare
from tests.zoo import talker, tokenizer

CONFIG = PreparationConfig(max_tokens=4, batch_size=16, density=False)
QUESTIONS = [f"What is {i} and {i * i}?" for i in range(101)]


COUNTRIES = (
    "France", "Japan", "Estonia", "Peru", "Kenya", "Norway", "Chad", "Nepal", "Cuba", "Laos", "Italy", "Egypt", "Fiji",
    "Chile", "Ghana", "India", "Zorbelheim", "Canada", "Mali", "Oman",
)  # fmt: skip


class KilledError(Exception):
    """Ends a run in the middle, as a signal would."""


@pytest.fixture(scope="module")
def prepared(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "adapter"
    return prepare(model_folder, out, QUESTIONS, config=CONFIG)


def save_different(folder):
    """Save another base model of the same shape."""
    different = copy.deepcopy(talker())
    different.model.norm.weight.data *= 2
    different.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_percentile_is_the_share_of_the_answers_with_a_lower_risk(prepared, model_folder):
    bare = RiskAwareLM.load(model_folder, wrapper=None)
    lm = RiskAwareLM.load(adapter=prepared.folder)
    for name in ("sum_nll", "mean_total", "question_mean_nll"):
        values = np.array([a.scores[name] for a in bare.generate(QUESTIONS, max_tokens=4)])
        np.testing.assert_allclose(lm.reference[name], np.sort(values), rtol=1e-4)  # 101 quantiles of 101 answers
    answers = lm.generate(QUESTIONS, max_tokens=4)
    risks = np.array([a.risk for a in answers])
    assert {a.risk_name for a in answers} == {DEFAULT_RISK}
    for answer in answers:
        share = ((risks < answer.risk).sum() / len(risks), (risks <= answer.risk).sum() / len(risks))
        assert share[0] - 0.02 <= answer.percentile <= share[1] + 0.02


def test_tokens_are_those_of_the_model_as_it_was(prepared, model_folder):
    bare, lm = RiskAwareLM.load(model_folder, wrapper=None), RiskAwareLM.load(adapter=prepared.folder)
    assert type(lm.model) is type(bare.model)
    for a, b in zip(*(model.generate(QUESTIONS[:5], max_tokens=6) for model in (bare, lm)), strict=True):
        assert [t.id for t in a.tokens] == [t.id for t in b.tokens]
        assert a.percentile is None
        assert b.percentile is not None
    assert {f"token_{s}" for s in ("nll", "total", "epistemic")} <= set(lm.reference)


def test_the_result_says_what_it_is_relative_to(prepared):
    assert (prepared.answers, prepared.left_out) == (101, ())
    assert prepared.lines()[0].startswith("percentiles are relative to 101 answers of this model")
    manifest = storage.read_manifest(prepared.folder)
    assert manifest["reference_size"] == 101
    assert manifest["prepared"] == {"questions": 101, "max_tokens": 4, "source": None}
    assert manifest["wrappers"] == []
    assert not (prepared.folder / storage.WEIGHTS).exists()
    lm = RiskAwareLM.load(adapter=prepared.folder)
    assert lm.note.startswith("percentiles are relative to 101 answers of this model, and its risk is not calibrated")
    assert "`selfdoubt evaluate --adapter A --data ...`" in lm.note
    assert prepared.lm.front.reference_size == 101


def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(prepared, model_folder, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    asked: list[int] = []
    generate = RiskAwareLM.generate

    def count(lm, prompts, **options):
        if len(asked) == most:
            raise KilledError
        asked.append(len(prompts))
        return generate(lm, prompts, **options)

    most = 3
    monkeypatch.setattr(RiskAwareLM, "generate", count)
    with pytest.raises(KilledError):
        prepare(model_folder, out, QUESTIONS, config=CONFIG)
    assert not out.exists()
    work = tmp_path / ".adapter.prepare"
    kept = {path: path.stat().st_mtime_ns for path in work.glob("0*.json")}
    assert len(kept) == 3
    (work / "00003.json.part").write_text("[{", encoding="utf-8")  # cut off while it was written

    most = 100
    prepare(model_folder, out, QUESTIONS, config=CONFIG)
    assert len(asked) == 7  # batches: none was asked twice
    assert files(out) == files(prepared.folder)
    assert not work.exists()


def test_a_density_ranks_answers_and_changes_none(tmp_path, monkeypatch):
    config, out = PreparationConfig(max_tokens=6, batch_size=16), tmp_path / "A"
    questions = [f"What is the capital of {name}?" for name in COUNTRIES]
    lm = RiskAwareLM.load(pocket.folder(), wrapper=None, dtype="float32")
    plain = lm.generate(questions, max_tokens=6)
    with monkeypatch.context() as patched:
        patched.setattr(additions, "fit_density", lambda *_, **__: raise_killed())
        with pytest.raises(KilledError):
            prepare(lm, out, questions, config=config)
    with monkeypatch.context() as patched:  # all answers are there
        patched.setattr(RiskAwareLM, "generate", lambda *_, **__: raise_killed())
        prepare(lm, out, questions, config=config)
    lm = RiskAwareLM.load(adapter=out, dtype="float32")
    dense = lm.generate(questions, max_tokens=6)
    for a, b in zip(plain, dense, strict=True):
        assert [(t.id, t.logprob) for t in a.tokens] == [(t.id, pytest.approx(t.logprob, abs=1e-4)) for t in b.tokens]
        assert all(t.density is not None for t in b.tokens)
        assert a.scores.keys() <= b.scores.keys()
    # Measured there on given texts, here while decoding.
    for name, values in (
        ("mean_density", [a.scores["mean_density"] for a in dense]),
        ("token_density", [t.density for a in dense for t in a.tokens]),
    ):
        np.testing.assert_allclose(lm.reference[name][::25], np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), atol=0.02)
    assert lm.note.startswith(f"percentiles are relative to {len(COUNTRIES)} answers of this model")
    with pytest.raises(WrapError, match="only statistics, reference answers or a calibration, so there is nothing"):
        export_peft(out, tmp_path / "out")


def test_a_density_needs_features(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="prepare without a density: --no-density, density=False in Python") as raised:
        prepare(model_folder, tmp_path / "A", ["Who?"], config=PreparationConfig(max_tokens=1))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spec", [vote.Wrapper(n_voters=2, rank=2, weight_noise="auto"), sample.Wrapper(n_samples=2)])
def test_untrained_members_are_added_and_the_model_still_answers(model_folder, tmp_path, spec):
    out = tmp_path / "A"
    prepare(model_folder, out, QUESTIONS[:12], wrapper=spec, config=CONFIG)
    bare, lm = RiskAwareLM.load(model_folder, wrapper=None), RiskAwareLM.load(adapter=out)
    assert lm.model.spec.answer_from == "base"
    assert not lm.model.spec.seeks_noise
    assert lm.note.startswith("percentiles are relative to 12 answers")
    for a, b in zip(*(model.generate(QUESTIONS[:6], max_tokens=4) for model in (bare, lm)), strict=True):
        assert [t.id for t in a.tokens] == [t.id for t in b.tokens]
        assert b.scores["sum_epistemic"] > 0
    assert lm.reference["sum_epistemic"][-1] > 0
    with pytest.raises(ConfigError, match="the model has a wrapper already, so prepare cannot add another one"):
        prepare(lm, tmp_path / "B", QUESTIONS[:3], wrapper=spec, config=CONFIG)


def test_a_wrapper_that_must_be_trained_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"prepare adds vote or sample, .* got selfdoubt\.sculpt"):
        prepare("missing", tmp_path / "A", wrapper=sculpt.Wrapper())


def raise_killed():
    raise KilledError


def test_a_killed_run_with_other_settings_is_refused(model_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(RiskAwareLM, "generate", lambda *_, **__: raise_killed())
        with pytest.raises(KilledError):
            prepare(model_folder, tmp_path / "a", QUESTIONS[:3], config=CONFIG)
    for questions, config, differs in (
        (QUESTIONS[:3], PreparationConfig(max_tokens=5, batch_size=16, density=False), "max_tokens was 4, and is 5"),
        (QUESTIONS[:4], CONFIG, "questions was 3, "),
    ):
        with pytest.raises(ConfigError, match=rf"\.a\.prepare holds answers of another preparation \({differs}"):
            prepare(model_folder, tmp_path / "a", questions, config=config)
    assert prepare(model_folder, tmp_path / "a", QUESTIONS[:3], config=CONFIG).answers == 3


def test_a_broken_work_file_is_one_line(model_folder, tmp_path, monkeypatch):
    lm = RiskAwareLM.load(model_folder)
    monkeypatch.setattr(storage, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="adapter cannot be written"):
        prepare(lm, tmp_path / "adapter", QUESTIONS[:3], config=CONFIG)
    assert not (tmp_path / "adapter").exists()
    work = tmp_path / ".adapter.prepare"
    (work / "00000.json").write_text('[{"text": "a"}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"00000\.json cannot be read .*; remove it, and prepare again"):
        prepare(lm, tmp_path / "adapter", QUESTIONS[:3], config=CONFIG)


def test_a_preparation_may_be_made_again_and_nothing_else_is_replaced(prepared, model_folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(prepared.folder, again)
    assert prepare(model_folder, again, QUESTIONS[:5], config=CONFIG).answers == 5
    assert storage.read_manifest(again)["reference_size"] == 5

    other, trained, notes = tmp_path / "other", tmp_path / "trained", tmp_path / "notes"
    save_different(other)
    RiskAwareLM(vote.Wrapper(n_voters=2, rank=1)(talker()), tokenizer()).save(trained, base="a base")
    notes.mkdir()
    (notes / "mine.txt").write_text("keep", encoding="utf-8")
    (tmp_path / "file").write_text("keep", encoding="utf-8")
    for model, out, message in (
        (other, again, r"again was prepared for another model \(.*model.*\); give another --out"),
        (model_folder, trained, "is an adapter already, which was not made by prepare"),
        (model_folder, notes, "notes is not empty, and nothing exported it"),
        (model_folder, tmp_path / "file", "file is a file, and a folder is to be written there"),
        (model_folder, model_folder, "is not empty, and nothing exported it"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ConfigError, match=message) as raised:
            prepare(model, out, QUESTIONS[:3], config=CONFIG)
        assert "\n" not in str(raised.value)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_adapter_is_for_its_own_base(prepared, tmp_path):
    save_different(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"was made for another base model than this: .* differs"):
        RiskAwareLM.load(tmp_path, adapter=prepared.folder)


def test_calibrating_keeps_the_reference_and_cannot_be_lost(prepared, tmp_path):
    pytest.importorskip("sklearn")
    adapter = tmp_path / "adapter"
    shutil.copytree(prepared.folder, adapter)
    lm = RiskAwareLM.load(adapter=adapter)
    labelled = [(q, ["this"]) for q in QUESTIONS[:60]]
    run = selfdoubt.evaluate(
        lm, labelled, tmp_path / "run", config=EvaluationConfig(max_tokens=4), states="none", draws=2,
        judge=lambda question, _: Verdict(int(question.text.split()[2]) % 2 == 0),
        run=Run(model=None, adapter=str(adapter), wrapper="auto", dtype="auto", data="mine"),
    )  # fmt: skip
    assert "rank_nll" in run.records[0].scores
    assert run.records[0].percentile is not None
    selfdoubt.calibrate(run, candidates=["answer"], draws=0)
    again = RiskAwareLM.load(adapter=adapter)
    assert again.reference == lm.reference
    assert again.calibration is not None
    assert again.note is None
    assert again.front.reference_size == 101
    assert again.generate(QUESTIONS[1], max_tokens=4).p_correct is not None
    with pytest.raises(ConfigError, match="was calibrated after it was prepared, and preparing again would drop that"):
        prepare(prepared.lm, adapter, QUESTIONS[:3], config=CONFIG)
    with pytest.raises(ConfigError, match="prepare a model before it is calibrated"):
        prepare(again, tmp_path / "new", QUESTIONS[:3], config=CONFIG)


def test_there_is_nothing_to_export(prepared, tmp_path):
    for export in (export_peft, export_merged):
        with pytest.raises(WrapError, match="adds no weights to its base model") as raised:
            export(prepared.folder, tmp_path / "out")
        assert "\n" not in str(raised.value)


def test_a_wrapped_model_keeps_its_wrapper(model_folder, tmp_path):
    base = RiskAwareLM.load(model_folder, wrapper=None)
    wrapped = vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5)(base.model).eval()
    lm = RiskAwareLM(wrapped, base.tokenizer)
    trained = lm.save(tmp_path / "trained", base=str(model_folder))
    note = RiskAwareLM.load(adapter=trained).note
    assert note.startswith("the risk of this adapter is not calibrated and has no percentile")
    result = prepare(lambda: RiskAwareLM.load(adapter=trained), tmp_path / "out", QUESTIONS[:6], config=CONFIG)
    again = RiskAwareLM.load(adapter=result.folder)
    assert again.model.spec == wrapped.spec
    assert again.reference["sum_epistemic"][-1] > 0
    a, b = lm.generate(QUESTIONS[0], max_tokens=4), again.generate(QUESTIONS[0], max_tokens=4)
    assert [t.id for t in a.tokens] == [t.id for t in b.tokens]


def test_questions_may_be_a_file_or_records_and_a_passage_comes_first(model_folder, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("ask,passage\nWho?,Ann was here.\nWhere?,\n", encoding="utf-8")
    lm = RiskAwareLM.load(model_folder)
    prompts = ["Passage: Ann was here.\n\nWho?", "Where?"]
    expected = [a.scores["question_sum_nll"] for a in lm.generate(prompts, max_tokens=4)]
    listed = [Question("", "Who?", "Ann was here.", answers=("Ann",)), "Where?"]
    a = prepare(lm, tmp_path / "a", file, config=CONFIG, columns=Columns(question="ask"))
    b = prepare(lm, tmp_path / "b", listed, config=CONFIG)
    for result in (a, b):
        values = result.lm.reference["question_sum_nll"]
        assert [values[0], values[-1]] == pytest.approx(sorted(expected), rel=1e-4)
    assert storage.read_manifest(a.folder)["prepared"]["source"] == str(file)
    assert storage.read_manifest(a.folder)["reference"] == storage.read_manifest(b.folder)["reference"]


def test_questions_without_room_are_left_out_and_counted(model_folder, tmp_path):
    lm = RiskAwareLM.load(model_folder)
    long = "why " * (lm.front.context + 1)
    result = prepare(lm, tmp_path / "a", ["Who?", long], config=CONFIG)
    assert (result.answers, result.left_out) == (1, (long,))
    assert any(text.startswith("1 question left out") for text in result.lines())
    with pytest.raises(DataError, match=r"none of the 1 questions leaves room for an answer in the model's \d+ tokens"):
        prepare(lm, tmp_path / "b", [long], config=CONFIG)
    assert not list(tmp_path.glob(".b*"))


@pytest.mark.parametrize(
    ("questions", "options", "error", "message"),
    [
        ([], {}, DataError, "there are no questions"),
        (["Who?", " "], {}, DataError, "question 1 of the list is empty"),
        (["Who?"], {"limit": 0}, ConfigError, "the limit must be at least 1"),
        (["Who?"], {"split": "test"}, ConfigError, "columns and split say how to read a file of questions"),
        (None, {"columns": Columns(question="x")}, ConfigError, "columns and split say how to read a file of"),
        ("missing.txt", {}, DataError, "missing.txt cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_loads(tmp_path, questions, options, error, message):
    def load():
        raise AssertionError("the model was loaded")

    with pytest.raises(error, match=re.escape(message)) as raised:
        prepare(load, tmp_path / "a", questions, **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        PreparationConfig(max_tokens=0)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got -1"):
        PreparationConfig(batch_size=-1)


def test_an_adapter_of_an_earlier_version_has_no_size_and_loads(prepared, tmp_path):
    adapter = tmp_path / "old"
    shutil.copytree(prepared.folder, adapter)
    manifest = json.loads((adapter / storage.MANIFEST).read_text(encoding="utf-8"))
    del manifest["reference_size"], manifest["prepared"]
    storage.write_manifest(adapter, manifest)
    lm = RiskAwareLM.load(adapter=adapter)
    assert lm.note.startswith("percentiles are relative to answers of this model, and its risk is not calibrated")
    assert lm.front.reference_size is None
    assert "reference_size" not in storage.read_manifest(lm.save(tmp_path / "saved"))
