"""Short real texts with labels for ``encoder``: which subject, country or article they belong to.

Files are those of ``shared/data``: OpenTriviaQA's questions with their category, GeoNames' towns with their country,
and SQuAD 2's questions with the article that they were asked about. The test set is the same for all seeds, so that
arms can be paired text by text; a seed draws the texts to learn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CATEGORIES = ("animals", "geography", "history", "literature", "movies", "music", "science-technology", "sports")
COUNTRIES = ("US", "IN", "BR", "DE", "RU", "CN", "JP", "IT")
ARTICLES = 8
Pairs = list[tuple[str, str]]


class Texts(NamedTuple):
    """Token ids of texts, ``(n, length)`` with zeros behind each, their classes, and texts of another kind."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    others: Tensor
    classes: int


def read_trivia(data: Path) -> tuple[Pairs, list[str]]:
    """Return trivia questions with their category, and Alpaca's instructions."""
    rows = map(json.loads, (data / "opentriviaqa" / "opentriviaqa.jsonl").read_text(encoding="utf-8").splitlines())
    pairs = [(row["question"], row["category"]) for row in rows if row["category"] in CATEGORIES]
    tasks = json.loads((data / "alpaca" / "alpaca_data.json").read_text(encoding="utf-8"))
    return pairs, [task["instruction"] for task in tasks if not task["input"]]


def read_towns(data: Path) -> tuple[Pairs, list[str]]:
    """Return names of towns with their country, and of towns of other countries."""
    rows = [row.split("\t") for row in (data / "atlas" / "cities15000.txt").read_text(encoding="utf-8").splitlines()]
    towns = [(row[1], row[8]) for row in rows]
    return [t for t in towns if t[1] in COUNTRIES], [name for name, country in towns if country not in COUNTRIES]


def read_articles(data: Path) -> tuple[Pairs, list[str]]:
    """Return questions with the article that they are about, and questions about other articles."""
    record = json.loads((data / "squad2" / "squad_dev_v2.0_rebuilt.json").read_text(encoding="utf-8"))
    asked = {
        article["title"]: [asked["question"] for part in article["paragraphs"] for asked in part["qas"]]
        for article in record["data"]
    }
    titles = sorted(asked, key=lambda title: -len(asked[title]))[:ARTICLES]
    pairs = [(question, title) for title in titles for question in asked[title]]
    return pairs, [question for title in asked if title not in titles for question in asked[title]]


TASKS: dict[str, Callable[[Path], tuple[Pairs, list[str]]]] = {
    "trivia": read_trivia, "towns": read_towns, "articles": read_articles,
}  # fmt: skip


def read_texts(
    task: str, data: Path, tokenizer: Any, seed: int, *, training: int, test: int, others: int, length: int = 32
) -> Texts:
    """Return the texts of a task: the test set and the others of all seeds, and the texts that this seed learns.

    A text that occurs twice is kept once, so that no tested text has been learnt.

    Args:
        task: One of ``TASKS``.
        data: The folder of data sets.
        tokenizer: A Hugging Face tokenizer.
        seed: Seed of the texts to learn.
        training: Number of texts to learn.
        test: Number of texts to test.
        others: Number of texts of another kind.
        length: Tokens of a text that are read.
    """
    pairs, strange = TASKS[task](data)
    pairs, strange = list(dict(pairs).items()), list(dict.fromkeys(strange))
    random.Random(0).shuffle(pairs)
    random.Random(0).shuffle(strange)
    tested, rest = pairs[:test], pairs[test:]
    learnt = random.Random(seed).sample(rest, training)
    names = sorted({name for _, name in pairs})

    def encode(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
        return ids["input_ids"] * ids["attention_mask"]  # type: ignore[no-any-return]

    x, test_x = (encode([text for text, _ in part]) for part in (learnt, tested))
    y, test_y = (torch.tensor([names.index(name) for _, name in part]) for part in (learnt, tested))
    return Texts(x, y, test_x, test_y, encode(strange[:others]), len(names))
