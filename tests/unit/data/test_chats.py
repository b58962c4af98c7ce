"""Every layout in every format, and where a record is broken."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from selfdoubt.data.chats import read_chats
from selfdoubt.errors import DataError

INSTRUCTIONS = [
    {"instruction": "Add, please", "input": "1 and 2", "output": "3"},
    {"instruction": 'Say "hi"\nin two lines', "input": "", "output": "hi\nthere"},
]
CHATS = [
    [
        {"role": "user", "content": "Add, please"},
        {"role": "input", "content": "1 and 2"},
        {"role": "assistant", "content": "3"},
    ],
    [{"role": "user", "content": 'Say "hi"\nin two lines'}, {"role": "assistant", "content": "hi\nthere"}],
]


def write(path: Path, records: list[Any]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(r) for r in records) + "\n")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(records[0]))
            table.writeheader()
            table.writerows(records)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_chats(tmp_path, suffix):
    assert list(read_chats(write(tmp_path / f"data{suffix}", INSTRUCTIONS))) == CHATS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_questions_with_answers_are_a_layout(tmp_path, suffix):
    records = [{"id": "1", "question": "Where is Paris?", "answer": "In France."}]
    chat = [{"role": "user", "content": "Where is Paris?"}, {"role": "assistant", "content": "In France."}]
    assert list(read_chats(write(tmp_path / f"data{suffix}", records))) == [chat]


def test_of_several_right_answers_the_first_is_learnt(tmp_path):
    file = write(tmp_path / "data.jsonl", [{"question": "Where?", "answer": ["here", "there"]}])
    assert next(read_chats(file))[-1]["content"] == "here"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_chats_are_a_layout(tmp_path, suffix):
    chat = [{"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")]
    assert list(read_chats(write(tmp_path / f"data{suffix}", [{"messages": chat}]))) == [chat]


def test_a_chat_in_a_cell_is_json(tmp_path):
    chat = [{"role": r, "content": r} for r in ("user", "assistant")]
    assert list(read_chats(write(tmp_path / "data.csv", [{"messages": json.dumps(chat)}]))) == [chat]


def test_a_line_separator_within_a_cell_of_csv_is_text(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer\nWhere?,here\u2028and\x85there\n", encoding="utf-8")
    assert next(read_chats(str(tmp_path / "data.csv")))[-1]["content"] == "here\u2028and\x85there"


def test_a_limit_reads_no_further(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(INSTRUCTIONS[0]) + "\n{broken")
    assert len(list(read_chats(str(file), limit=1))) == 1


GOOD = json.dumps(INSTRUCTIONS[0])


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.jsonl", f"{GOOD}\n\n{{broken", "line 3: broken JSON"),
        ("a.jsonl", f"{GOOD}\n[1]", "line 2: wanted an object with keys, found list"),
        ("a.jsonl", f'{GOOD}\n{{"instruction": "x", "output": 7}}', "line 2: output must be text, found int"),
        ("a.jsonl", f'{GOOD}\n{{"instruction": " ", "output": "y"}}', "line 2: instruction is empty"),
        ("a.jsonl", '{"prompt": "x", "output": "y"}', "as instruction it lacks instruction"),
        ("a.json", f"[\n{GOOD},\n{{broken", "line 3: broken JSON"),
        ("a.json", f"[\n{GOOD}\n{GOOD}]", "line 3: wanted ',' or ']'"),
        ("a.json", f"[{GOOD}", "wanted ',' or ']'"),
        ("a.json", "7", "wanted a list of objects, found '7'"),
        ("a.json", "[]", "holds no records"),
        ("a.csv", 'question,answer\nx,"y', "broken CSV"),
        ("a.csv", "question,answer\nx,y,z", "line 2: more cells than the header"),
        ("a.csv", "question,answer\nx", "line 2: answer must be text, found None"),
        ("a.parquet", "no", "is not a Parquet file"),
        ("a.txt", "no", "ends in '.txt'"),
        ("a.jsonl", '{"messages": []}', "messages must be a list"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "no message is the assistant's"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "each message needs a role and a content"),
        ("a.csv", "messages\nx", "line 2: messages is not JSON"),
    ],
)
def test_what_is_broken_is_named_with_its_place(tmp_path, name, text, wanted):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(DataError) as raised:
        list(read_chats(str(file)))
    assert wanted in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_text_that_is_not_utf8_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        list(read_chats(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("source", ["./nowhere.json", "nowhere.jsonl", "/nowhere", "."])
def test_a_missing_file_is_not_asked_of_the_hub(source):
    with pytest.raises(DataError, match="no data file at"):
        list(read_chats(source))


def test_a_name_that_cannot_be_loaded_is_one_line():
    with pytest.raises(DataError, match="neither a file here nor a data set") as raised:
        list(read_chats("no-such-owner/no-such-data"))
    assert "\n" not in str(raised.value)


def test_the_real_alpaca_file_is_read_whole():
    file = Path(__file__).parents[4] / "shared" / "data" / "alpaca" / "alpaca_data.json"
    if not file.is_file():
        pytest.skip("the data folder with Alpaca is not beside this checkout")
    chats = list(read_chats(str(file)))
    assert len(chats) == 52_002
    assert sum(len(chat) == 2 for chat in chats) == 31_323  # with an empty input
    assert sum(not chat[-1]["content"].strip() for chat in chats) == 28
