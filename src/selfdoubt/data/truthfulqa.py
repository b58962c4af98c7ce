"""TruthfulQA (Lin et al., 2022), from its own two files or from the hub: generation, MC1 and MC2.

The two files are in different orders and joined on the stripped question. In both the right choices come first, so they
are shuffled here, each question by its own id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from selfdoubt.data.cells import read_required_text, read_texts
from selfdoubt.data.order import make_rank_key, make_text_id
from selfdoubt.data.questions import Question
from selfdoubt.data.readers import Placed, Row, read_file_rows, read_hub_rows
from selfdoubt.errors import ConfigError, DataError

HUB = "truthfulqa/truthful_qa"
CSV, JSON = "TruthfulQA.csv", "mc_task.json"
TruthfulQATask = Literal["gen", "mc1", "mc2"]
_GEN = ("question", "best_answer", "correct_answers", "incorrect_answers")


def is_generation(row: Row) -> bool:
    """Return whether this is a row of ``TruthfulQA.csv`` or of the hub's generation set."""
    return set(_GEN) <= set(_lower(row))


def is_choice(row: Row) -> bool:
    """Return whether this is an entry of ``mc_task.json`` or of the hub's multiple-choice set."""
    return {"question", "mc1_targets", "mc2_targets"} <= set(row)


def read_files(path: Path, task: str | None, seed: int) -> list[tuple[Question, Row]]:
    """Read the questions of the two files: from the folder that holds them, or from one file with the other next to it.

    Args:
        path: The folder or either file.
        task: gen, mc1 or mc2; None is gen, and mc1 where the path is that of ``mc_task.json``.
        seed: Seed of the order of choices.

    Raises:
        DataError: If a file is missing or broken, or a question of one is not in the other.
        ConfigError: If the task is unknown.
    """
    files = _files(path)
    kind = _task(task, "mc1" if path == files.get(JSON) else "gen")
    needed = CSV if kind == "gen" else JSON
    if needed not in files:
        raise DataError(f"TruthfulQA's task {kind} needs {needed}, and there is none at {path}; put it there")
    generation = read_file_rows(files[CSV]) if CSV in files else []
    return _questions(generation, read_file_rows(files[JSON]) if kind != "gen" else [], kind, seed)


def read_from_hub(task: str | None, seed: int, split: str | None, revision: str | None) -> list[tuple[Question, Row]]:
    """Read the questions of the hub's two configurations.

    Raises:
        DataError: If they cannot be loaded.
        ConfigError: If the task is unknown.
    """
    kind = _task(task, "gen")
    generation = read_hub_rows(HUB, "generation", split or "validation", revision)
    choice = [] if kind == "gen" else read_hub_rows(HUB, "multiple_choice", split or "validation", revision)
    return _questions(generation, choice, kind, seed)


def _files(path: Path) -> dict[str, Path]:
    """Find the two files, or one of them; a file of another name is recognised by its first row."""
    folder = path if path.is_dir() else path.parent
    files = {name: folder / name for name in (CSV, JSON) if (folder / name).is_file()}
    if path.is_file():
        first = next(iter(read_file_rows(path)), None)
        files[CSV if first is not None and is_generation(first[1]) else JSON] = path
    return files


def _task(task: str | None, default: TruthfulQATask) -> TruthfulQATask:
    names: tuple[TruthfulQATask, ...] = get_args(TruthfulQATask)
    for name in names:
        if name == (task or default):
            return name
    raise ConfigError(f"TruthfulQA has no task {task!r}; choose one of {', '.join(names)}")


def _questions(
    generation: list[Placed], choice: list[Placed], task: TruthfulQATask, seed: int
) -> list[tuple[Question, Row]]:
    if task == "gen":
        return [(_open(place, row), row) for place, row in generation]
    topics = {read_required_text(place, low, "question"): low.get("category")
              for place, row in generation for low in [_lower(row)]}  # fmt: skip
    questions = []
    for place, row in choice:
        text = read_required_text(place, row, "question")
        if topics and text not in topics:
            raise DataError(f"{place}: the question {text!r} is not in {CSV}; take both files from one release")
        questions.append((_closed(place, row, text, topics.get(text), task, seed), row))
    return questions


def _open(place: str, row: Row) -> Question:
    low = _lower(row)
    text = read_required_text(place, low, "question")
    best, right, wrong = (read_texts(place, name, low.get(name), ";") for name in _GEN[1:])
    return Question(
        make_text_id(text), text, None, tuple(dict.fromkeys(best + right)), wrong, topic=low.get("category") or None
    )


def _closed(place: str, row: Row, text: str, topic: str | None, task: TruthfulQATask, seed: int) -> Question:
    targets = row.get(f"{task}_targets")
    if isinstance(targets, Mapping) and {"choices", "labels"} <= set(targets):
        pairs = list(zip(targets["choices"], targets["labels"], strict=True))
    else:
        pairs = list(targets.items()) if isinstance(targets, Mapping) else []
    if {label for _, label in pairs} != {0, 1} or not all(isinstance(c, str) and c.strip() for c, _ in pairs):
        raise DataError(f"{place}: {task}_targets must map texts to 0 and 1, with at least one of each; fix the entry")
    id_ = make_text_id(text)
    pairs = sorted(pairs, key=lambda pair: make_rank_key(seed, id_, pair[0]))
    choices = tuple(c for c, _ in pairs)
    right = tuple(i for i, (_, label) in enumerate(pairs) if label == 1)
    return Question(id_, text, None, tuple(choices[i] for i in right), (), choices, right, topic)


def _lower(row: Row) -> dict[str, Any]:
    return {str(k).lower().replace(" ", "_"): v for k, v in row.items()}
