"""Scores the answers of another system. Every row keeps its place and its entries, also if it cannot be scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdoubt.data.cells import has_lone_surrogate
from selfdoubt.data.readers import read_json_lines
from selfdoubt.errors import ConfigError, DataError, NonFiniteError, PromptError
from selfdoubt.storage import write_file

if TYPE_CHECKING:
    from selfdoubt.lm.answer import Answer
    from selfdoubt.lm.model import RiskAwareLM

#: Keys that scoring writes into a row, in place of earlier ones.
WRITTEN = (
    "scores", "tokens", "question_tokens", "percentile", "p_correct", "p_correct_note", "abstain", "p_answerable",
    "finish", "note",
)  # fmt: skip


def read_answer_rows(file: str, out: Path, question_column: str) -> list[dict[str, Any]]:
    """Read the rows of a file of answers, before a model loads.

    Raises:
        DataError: If the file cannot be read, is empty, or no row has a question.
        ConfigError: If the scored file would replace it.
    """
    if out.resolve() == Path(file).resolve():
        raise ConfigError(f"--out {out} is the file of answers itself; give another name")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.absolute().parent} does not exist; make it first")
    rows = [dict(row) for _, row in read_json_lines(Path(file))]
    if not rows:
        raise DataError(f"{file} holds no answers; write one object per line")
    if not any(question_column in row for row in rows):
        keys = ", ".join(sorted(rows[0]))
        raise DataError(
            f"no row of {file} has the key {question_column!r}, the first has {keys}; see --question-column"
        )
    return rows


def rescore(
    lm: RiskAwareLM,
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    question_column: str = "question",
    answer_column: str = "answer",
    batch_size: int = 32,
) -> int:
    """Score the answer of each row and write all rows, in their order, whole or not at all; a row without id gets one.

    Args:
        lm: The model that scores.
        rows: Plain objects.
        out: The file to write.
        question_column: Key of the question: a text, or chat messages.
        answer_column: Key of the answer.
        batch_size: Number of answers that are scored together.

    Returns:
        Number of rows without a score; each has the reason under ``note``.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    scored_rows: list[dict[str, Any]] = [
        {"id": str(i), **{k: v for k, v in row.items() if k not in WRITTEN}} for i, row in enumerate(rows, 1)
    ]
    fit = [i for i, row in enumerate(rows) if not _refuse(scored_rows[i], row, question_column, answer_column)]
    fit.sort(key=lambda i: (-len(str(rows[i][question_column])) - len(rows[i][answer_column]), i))
    for first in range(0, len(fit), batch_size):
        part = fit[first : first + batch_size]
        pairs = [(rows[i][question_column], rows[i][answer_column]) for i in part]
        for i, scored in zip(part, _score(lm, pairs), strict=True):
            scored_rows[i] |= {"note": scored} if isinstance(scored, str) else _entries(scored)
    write_file(
        out,
        "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in scored_rows).encode(
            "utf-8", "backslashreplace"
        ),
    )
    return sum("scores" not in row for row in scored_rows)


def _refuse(entry: dict[str, Any], row: Mapping[str, Any], question_column: str, answer_column: str) -> bool:
    for name in (question_column, answer_column):
        value = row.get(name)
        chat = name == question_column and isinstance(value, list) and value
        if not chat and not (isinstance(value, str) and value.strip()):
            entry["note"] = f"not scored: {name} is {'missing' if value is None else 'empty or no text'}"
            return True
        if has_lone_surrogate(json.dumps(value, ensure_ascii=False)):
            entry["note"] = f"not scored: {name} holds half of a character (a lone surrogate)"
            return True
    return False


def _score(lm: RiskAwareLM, pairs: Sequence[tuple[Any, str]]) -> list[Answer | str]:
    """Return per pair the scored answer or the reason why there is none; a batch that fails is retried one by one."""
    try:
        return list(lm.score_batch(pairs, alternatives=0))
    except (PromptError, NonFiniteError) as error:
        if len(pairs) == 1:
            return [f"not scored: {error}"]
        return [scored for pair in pairs for scored in _score(lm, [pair])]


def _entries(answer: Answer) -> dict[str, Any]:
    return {
        "scores": dict(answer.scores),
        "tokens": [[t.text, t.risk] for t in answer.tokens],
        "percentile": answer.percentile,
        "p_correct": answer.p_correct,
        "p_correct_note": answer.p_correct_note,
        "abstain": answer.abstain,
        "p_answerable": answer.p_answerable,
        "finish": answer.finish,
    }
