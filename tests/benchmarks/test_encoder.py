"""``benchmarks.encoder`` at a size that says nothing: its texts, resuming, and the table."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import encoder
from benchmarks.encoder_texts import CATEGORIES, COUNTRIES, TASKS, read_texts
from selfdoubt import sample

SIZES = {"training": 24, "test": 12, "others": 6, "length": 8}
SETTINGS = {**SIZES, "epochs": 1, "batch": 12, "rate": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files in the formats of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("opentriviaqa", "alpaca", "atlas", "squad2"):
        (folder / name).mkdir()
    asked = [{"question": f"what {c} {i}", "category": c} for i in range(6) for c in (*CATEGORIES, "hobbies")]
    text = "\n".join(map(json.dumps, [*asked, asked[0]]))  # one comes twice
    (folder / "opentriviaqa" / "opentriviaqa.jsonl").write_text(text, encoding="utf-8")
    tasks = [{"instruction": f"do {i}", "input": "" if i % 2 else "text"} for i in range(20)]
    (folder / "alpaca" / "alpaca_data.json").write_text(json.dumps(tasks))
    towns = [["1", f"{country} town {i}", *[""] * 6, country, ""] for i in range(6) for country in (*COUNTRIES, "FR")]
    (folder / "atlas" / "cities15000.txt").write_text("\n".join(map("\t".join, towns)), encoding="utf-8")
    articles = [
        {"title": f"title {t}", "paragraphs": [{"qas": [{"question": f"why {t} {i}"} for i in range(7 - t // 8)]}]}
        for t in range(9)
    ]
    (folder / "squad2" / "squad_dev_v2.0_rebuilt.json").write_text(json.dumps({"data": articles}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random encoder with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "what", "why", "do", "town", *CATEGORIES, *COUNTRIES, *map(str, range(9))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", list(TASKS))
def test_seeds_learn_other_texts_and_test_the_same(data, model, task):
    tokenizer = AutoTokenizer.from_pretrained(model)
    one, other = (read_texts(task, data, tokenizer, seed, **SIZES) for seed in (0, 1))
    assert one.classes == 8
    assert [tuple(part.shape) for part in (one.x, one.test_x, one.others)] == [(24, 8), (12, 8), (6, 8)]
    assert torch.equal(one.test_x, other.test_x)
    assert torch.equal(one.test_y, other.test_y)
    assert not torch.equal(one.x, other.x)
    learnt = {tuple(row) for row in one.x.tolist()}
    assert not learnt & {tuple(row) for row in one.test_x.tolist()}


def test_padding_changes_no_answer(model):
    classifier = encoder.build(model, 8, seed=0).eval()
    ids = torch.tensor([[2, 7, 0, 0, 0], [3, 6, 8, 9, 0]])
    together = encoder.predict(classifier, ids)
    alone = encoder.predict(classifier, ids[:1, :2])
    torch.testing.assert_close(together.logits[:, :1], alone.logits)
    torch.testing.assert_close(together.doubt[:1], alone.doubt)


def test_samples_answer_in_the_order_of_the_texts(model):
    wrapped = sample.Wrapper(answer_from="mean", output="logits")(encoder.build(model, 8, seed=0)).eval()
    ids = torch.tensor([[3, 6, 8, 9], [2, 7, 0, 0], [4, 5, 6, 0], [9, 0, 0, 0]])
    answer = encoder.predict(wrapped, ids, rows=2)
    assert answer.logits.shape == (5, 4, 8)
    for row in range(4):
        alone = encoder.predict(wrapped, ids[row : row + 1])
        torch.testing.assert_close(answer.logits[:, row : row + 1], alone.logits)
        torch.testing.assert_close(answer.doubt[row : row + 1], alone.doubt, rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_where_it_stopped_and_its_table_pairs_texts(data, model, tmp_path, monkeypatch):
    def run(arms):
        return encoder.run(model, data, ["towns"], arms, 2, SETTINGS, folder=tmp_path, again=False)

    file = run(["plain", "fresh-normal-0.1"])
    assert [(r["arm"], r["seed"]) for r in file.rows] == [
        ("plain", 0), ("fresh-normal-0.1", 0), ("plain", 1), ("fresh-normal-0.1", 1),
    ]  # fmt: skip
    assert all(a["right"] == b["right"] for a, b in zip(file.rows[::2], file.rows[1::2], strict=True))  # the base's
    rows = run(["plain", "normal-0.1"]).rows
    by = {(r["arm"], r["seed"]): [int(right) for right in r["right"]] for r in rows}
    gap = encoder.compare_answers(rows, "towns", "normal-0.1")
    assert gap is not None
    assert gap.value == pytest.approx(sum(sum(by["normal-0.1", s]) - sum(by["plain", s]) for s in (0, 1)) / 24)
    monkeypatch.setattr(encoder, "train", lambda *_: pytest.fail("measured again"))
    run(["plain", "normal-0.1", "fresh-normal-0.1"])
    text = encoder.table(json.loads(file.path.read_text()))
    assert "| towns: normal-0.1 |" in text
    assert "(" not in next(row for row in text.splitlines() if "towns: plain" in row)  # no difference to itself


def test_differences_are_paired_by_text():
    rows = [
        {"task": "towns", "arm": "plain", "seed": 0, "right": "1100"},
        {"task": "towns", "arm": "plain", "seed": 1, "right": "1010"},
        {"task": "towns", "arm": "normal-0.1", "seed": 1, "right": "1010"},
        {"task": "towns", "arm": "normal-0.1", "seed": 0, "right": "0100"},
    ]
    gap = encoder.compare_answers(rows, "towns", "normal-0.1")
    assert gap is not None
    assert gap.value == pytest.approx(-0.125)  # per text: -0.5, 0, 0, 0
    assert gap.high - gap.value == pytest.approx(3.182446 * 0.25 / 2, rel=1e-5)
    assert encoder.compare_answers(rows[:2], "towns", "normal-0.1") is None
