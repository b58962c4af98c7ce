"""The folder of an evaluated run: its answers, their hidden states and its settings, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from safetensors.torch import save as serialize

from selfdoubt.data.questions import AS_USUAL
from selfdoubt.errors import DataError
from selfdoubt.eval import external
from selfdoubt.eval import records as files
from selfdoubt.eval.records import Record
from selfdoubt.storage import write

if TYPE_CHECKING:
    from torch import Tensor

    from selfdoubt.eval.generate import AnsweredBatch

ANSWERS, STATES, RUN = "answers.jsonl", "states.safetensors", "run.json"


def save_run(asked: AnsweredBatch, records: Sequence[Record], run: Mapping[str, Any], out: Path) -> None:
    """Write ``answers.jsonl``, the hidden states and what the run was."""
    files.save_records(out / ANSWERS, records)
    if asked.states:
        write(out / STATES, serialize({name: tensor.contiguous() for name, tensor in asked.states.items()}))
    write(out / RUN, (json.dumps(dict(run), indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def read_run(folder: Path) -> tuple[list[Record], dict[str, Tensor], dict[str, Any]]:
    """Records, hidden states and settings of an evaluated folder.

    Raises:
        DataError: If it is none, or a file is broken.
    """
    found, run = read_run_answers(folder)
    states = load_file(folder / STATES) if (folder / STATES).is_file() else {}
    if any(len(tensor) != len(found) for tensor in states.values()):
        raise DataError(f"{folder / STATES} does not belong to {ANSWERS} beside it; evaluate again")
    return found, states, run


def read_run_answers(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """Read records and settings of an evaluated folder, or the records of a file of answers.

    Raises:
        DataError: If it is none, or a file is broken.
    """
    file = find_answers_file(path)
    if not file.is_file():
        raise DataError(f"{path} holds no answers; give a folder that `selfdoubt evaluate` wrote, or a file of answers")
    if not path.is_dir():
        return external.read_external_answers(path, columns=AS_USUAL).records, {}
    about = file.parent / RUN
    try:
        run = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise DataError(f"{about} is broken ({error}); evaluate again") from None
    if not isinstance(run, dict):
        raise DataError(f"{about} is broken (it is no object); evaluate again")
    return files.read_records(file), run


def find_answers_file(path: Path) -> Path:
    """The file of answers in a folder, or the file itself."""
    return path / ANSWERS if path.is_dir() else path
