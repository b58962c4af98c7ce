"""The folder of an evaluated run: its answers, their hidden states and its settings, written and read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from safetensors.torch import save as serialize

from selfdoubt.data.questions import AS_USUAL
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval import external
from selfdoubt.eval import records as files
from selfdoubt.eval.records import Record
from selfdoubt.eval.settings import Run
from selfdoubt.storage import write_file

if TYPE_CHECKING:
    from torch import Tensor

    from selfdoubt.eval.generate import AnsweredBatch

ANSWERS, STATES, SETTINGS = "answers.jsonl", "states.safetensors", "run.json"
SHARDS_FOLDER = "parts"  #: see ``selfdoubt.eval.shards``
CACHE = "judge.jsonl"  #: replies of a language model that judges


def save_run(asked: AnsweredBatch, records: Sequence[Record], run: Run, out: Path) -> None:
    """Write ``answers.jsonl``, the hidden states and the settings of the run."""
    files.save_records(out / ANSWERS, records)
    if asked.states:
        write_file(out / STATES, serialize({name: tensor.contiguous() for name, tensor in asked.states.items()}))
    save_settings(run, out)


def save_settings(run: Run, out: Path) -> None:
    """Write ``run.json``."""
    text = json.dumps(run.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_file(out / SETTINGS, text.encode("utf-8", "backslashreplace"))


def read_run(folder: Path) -> tuple[list[Record], dict[str, Tensor], Run]:
    """Read the records, hidden states and settings of an evaluated folder.

    Raises:
        DataError: If it is not the folder of a run, or a file is broken.
    """
    records, run = read_run_answers(folder)
    states = load_file(folder / STATES) if (folder / STATES).is_file() else {}
    if any(len(tensor) != len(records) for tensor in states.values()):
        raise DataError(f"{folder / STATES} does not belong to {ANSWERS} next to it; evaluate again")
    return records, states, run


def read_run_answers(path: Path) -> tuple[list[Record], Run]:
    """Read records and settings of an evaluated folder, or the records of a file of answers.

    Raises:
        DataError: If it is neither, or a file is broken.
    """
    file = find_answers_file(path)
    if not file.is_file():
        raise DataError(f"{path} holds no answers; give a folder that `selfdoubt evaluate` wrote, or a file of answers")
    if not path.is_dir():
        return external.read_external_answers(path, columns=AS_USUAL).records, Run.parse({})
    return files.read_records(file), _read_settings(file.parent / SETTINGS)


def _read_settings(file: Path) -> Run:
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(entries, dict):
            raise DataError("it is not an object")
        return Run.parse(entries)
    except (ValueError, DataError) as error:
        raise DataError(f"{file} is broken ({error}); evaluate again") from None


def check_run_folder(out: Path) -> None:
    """Refuse a folder that holds something other than a run.

    Raises:
        ConfigError: If it is a file, or holds other things.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not any((out / name).exists() for name in (SHARDS_FOLDER, SETTINGS, CACHE))
    ):
        raise ConfigError(f"--out {out} holds other things than a run; give a new or empty folder")


def find_answers_file(path: Path) -> Path:
    """Return the file of answers in a folder, or the file itself."""
    return path / ANSWERS if path.is_dir() else path
