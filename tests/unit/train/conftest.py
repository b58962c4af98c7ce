from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from selfdoubt import sample, sculpt, vote
from tests.zoo import talker, tokenizer

WRAPPERS = {
    "vote": vote.Wrapper(rank=4, weight_noise=0.5),
    "sample": sample.Wrapper(),
    "sculpt": sculpt.Wrapper(),
    "none": None,
}

TEXT = "what is the capital of France which currency do they use in Japan São Paulo Zürich yen Paris"


@pytest.fixture(scope="session")
def float32_folder(tmp_path_factory) -> str:
    """The model of ``model_folder`` in float32, in which it is trained."""
    path = tmp_path_factory.mktemp("float32")
    copy.deepcopy(talker()).float().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> str:
    """Sixty questions with answers of different lengths."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    words = TEXT.split()
    rows = [
        {"question": " ".join(words[i % 7 : i % 7 + 2 + i % 5]) + "?", "answer": " ".join(words[i % 11 :][: 1 + i % 4])}
        for i in range(60)
    ]
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)
