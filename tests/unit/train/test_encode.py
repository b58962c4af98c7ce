"""What a model learns from of a chat: the assistant's words and their end, in the template that it will meet again."""

from __future__ import annotations

import copy
import json

import pytest

from selfdoubt.errors import ConfigError, DataError
from selfdoubt.lm.load import find_stop_ids
from selfdoubt.lm.text.prompt import encode as encode_question
from selfdoubt.train.config import TrainConfig
from selfdoubt.train.encode import ALPACA, encode_chat, prepare_splits, prepare_tokenizer
from tests.zoo import talker, tokenizer


def chat(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(contents)]


def learnt(words, example):
    return words.decode([i for i, counted in zip(*example, strict=True) if counted])


def alpaca_tokenizer():
    words = copy.deepcopy(tokenizer())
    prepare_tokenizer(words, "alpaca")
    return words


@pytest.mark.parametrize("answer", ["Paris.", "São Paulo 😀", "assistant", "a\n\nb", "<|end|> <|user|>hi"])
def test_the_loss_sees_the_answer_and_its_end(answer):
    example = encode_chat(tokenizer(), chat("Where?", answer), loss_on="response", max_length=400)
    assert learnt(tokenizer(), example) == f"{answer}<|end|>"
    assert example.ids[-1] == tokenizer().eos_token_id


def test_the_prompt_is_the_one_that_will_be_asked():
    example = encode_chat(tokenizer(), chat("Where is Paris?", "In France."), loss_on="response", max_length=400)
    asked = encode_question(tokenizer(), "Where is Paris?").ids
    assert example.ids[: len(asked)] == asked
    assert example.counts.index(True) == len(asked)


def test_every_answer_of_a_chat_counts():
    example = encode_chat(tokenizer(), chat("One?", "Two.", "Three?", "Four."), loss_on="response", max_length=400)
    assert learnt(tokenizer(), example) == "Two.<|end|>Four.<|end|>"


def test_all_counts_everything_but_the_first_token():
    example = encode_chat(tokenizer(), chat("One?", "Two."), loss_on="all", max_length=400)
    assert example.counts == [False] + [True] * (len(example.ids) - 1)


def test_control_tokens_in_the_data_stay_plain_text():
    example = encode_chat(tokenizer(), chat("a<|end|>\n<|assistant|>b", "c"), loss_on="response", max_length=400)
    control = [i for i in example.ids if i in set(tokenizer().all_special_ids)]
    assert len(control) == 4
    assert learnt(tokenizer(), example) == "c<|end|>"


def test_a_long_chat_is_cut_at_its_end():
    whole = encode_chat(tokenizer(), chat("Where is Paris?", "In France."), loss_on="response", max_length=400)
    cut = encode_chat(tokenizer(), chat("Where is Paris?", "In France."), loss_on="response", max_length=9)
    assert cut.ids == whole.ids[:9]


def test_the_alpaca_prompt_with_and_without_input():
    words = alpaca_tokenizer()
    with_input = [
        {"role": "user", "content": "Add"}, {"role": "input", "content": "1 2"}, {"role": "assistant", "content": "3"},
    ]  # fmt: skip
    text = words.decode(encode_chat(words, with_input, loss_on="response", max_length=900).ids)
    assert text == (
        "<|bos|>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n"
        "### Response:\n3<|end|>"
    )
    example = encode_chat(words, chat("Add", "3"), loss_on="response", max_length=900)
    assert "paired with" not in words.decode(example.ids)
    assert learnt(words, example) == "3<|end|>"
    asked = encode_question(words, "Add").ids
    assert example.ids[: len(asked)] == asked


def test_other_templates_get_the_input_after_the_instruction():
    with_input = [
        {"role": "user", "content": "Add"}, {"role": "input", "content": "1 2"}, {"role": "assistant", "content": "3"},
    ]  # fmt: skip
    text = tokenizer().decode(encode_chat(tokenizer(), with_input, loss_on="response", max_length=400).ids)
    assert text == "<|user|>Add\n\n1 2<|end|>\n<|assistant|>3<|end|>"


def test_a_template_without_an_end_gets_one():
    words = copy.deepcopy(tokenizer())
    words.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    example = encode_chat(words, chat("One?", "Two."), loss_on="response", max_length=400)
    assert learnt(words, example) == "Two.<|end|>"


def test_a_tokenizer_gets_the_template_that_is_asked_for():
    words = copy.deepcopy(tokenizer())
    prepare_tokenizer(words, "auto")
    assert words.chat_template == tokenizer().chat_template
    words.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        prepare_tokenizer(words, "chat")
    prepare_tokenizer(words, "auto")
    assert words.chat_template == ALPACA
    words.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token"):
        prepare_tokenizer(words, "auto")


def records(tmp_path, n, answer="yes"):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"question": f"Is it {i}?", "answer": answer}) + "\n" for i in range(n)))
    return str(file)


def test_a_validation_share_is_split_off_the_same_way_each_time(tmp_path):
    config = TrainConfig(data=records(tmp_path, 50), out=str(tmp_path), val_share=0.1)
    first, again = (prepare_splits(config, tokenizer(), tmp_path / str(i)) for i in range(2))
    assert (len(first.train), len(first.val)) == (45, 5)
    assert first.val["chat"][:] == again.val["chat"][:]
    assert not set(first.val["chat"]) & set(first.train["chat"])


def test_texts_lie_in_a_mapped_file(tmp_path):
    found = prepare_splits(TrainConfig(data=records(tmp_path, 9), out=""), tokenizer(), tmp_path / "data")
    assert found.train.cache_files
    assert found.train.cache_files[0]["filename"].endswith(".arrow")


def test_what_is_left_out_or_cut_is_counted(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [("short?", "yes"), ("empty?", "  "), ("long?", "very " * 200), ("no room " * 200, "yes"), ("last?", "no")]
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    found = prepare_splits(
        TrainConfig(data=str(file), out="", max_length=64, val_share=0), tokenizer(), tmp_path / "data"
    )
    assert (len(found.train), len(found.val), found.empty, found.cut) == (3, 0, 2, 1)
    assert max(found.train["length"]) == 64


def test_too_few_examples_are_an_error(tmp_path):
    with pytest.raises(DataError, match="has 1 examples with a response"):
        prepare_splits(TrainConfig(data=records(tmp_path, 1), out=""), tokenizer(), tmp_path / "data")


def test_encoded_data_are_found_again_unless_something_changed(tmp_path):
    config = TrainConfig(data=records(tmp_path, 9), out="")
    prepare_splits(config, tokenizer(), tmp_path / "data")
    (file,) = (tmp_path / "data").glob("*.arrow")
    written = file.stat().st_mtime_ns
    prepare_splits(config, tokenizer(), tmp_path / "data")
    assert file.stat().st_mtime_ns == written
    records(tmp_path, 10)
    assert len(prepare_splits(config, tokenizer(), tmp_path / "data").train) == 9
    assert [f.suffix for f in sorted((tmp_path / "data").iterdir())] == [".arrow", ".json"]
    assert not file.exists()


CHATML = "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}AFTER{% endfor %}"


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("<|system|>\n", "<|system|>"),  # a token of its own ends turns
        ("\n<|system|>\n", "\n<|system|>"),
        ("\n", "<|end|>"),  # nothing does, so the end of text is learnt
        (" That was it.", "<|end|>"),
        ("{% if loop.last %}{{ eos_token }}{% endif %}", "<|end|>"),
    ],
)
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_the_end_that_is_learnt_is_one_that_stops_an_answer(after, end, loss_on):
    words = copy.deepcopy(tokenizer())
    words.chat_template = CHATML.replace("AFTER", after)
    example = encode_chat(words, chat("One?", "Two.", "Three?", "Four."), loss_on=loss_on, max_length=400)
    last = "Four." + end
    assert learnt(words, example).rstrip("\n").endswith(last)
    if loss_on == "response":
        assert learnt(words, example).startswith("Two.")
        assert "<|user|>" not in learnt(words, example)  # what opens a turn is nobody's to say
        assert example.ids[-1] in find_stop_ids(talker(), words)


def test_data_encoded_by_an_earlier_reader_are_not_taken_again(monkeypatch, tmp_path):
    config = TrainConfig(data=records(tmp_path, 9), out="")
    prepare_splits(config, tokenizer(), tmp_path / "data")
    (before,) = (tmp_path / "data").glob("*.json")
    monkeypatch.setattr("selfdoubt.train.encode.ENCODING", 10**6)
    prepare_splits(config, tokenizer(), tmp_path / "data")
    (after,) = (tmp_path / "data").glob("*.json")
    assert after.name != before.name
