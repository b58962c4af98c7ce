"""Work folder of a preparation, next to the adapter that it will be: one file per batch of answers.

::

    .A.prepare/settings.json   everything that the answers depend on
    .A.prepare/00003.json      the answers of batch 3, with every token's numbers
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval.shards import keep_settings
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.storage import write_file

SETTINGS_FILE = "settings.json"


class WorkFolder:
    """The finished batches of a preparation; a run that was cut off finds them again.

    Args:
        out: The adapter folder to be.
        about: Everything that the answers depend on, as plain data.

    Raises:
        ConfigError: If the folder holds answers of another preparation, or cannot be written.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self.path = out.with_name(f".{out.name}.prepare")
        try:
            differs = keep_settings(self.path / SETTINGS_FILE, about)
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror}); give an --out on a disk that can be written"
            ) from None
        if differs:
            raise ConfigError(
                f"{self.path} holds answers of another preparation ({differs}); remove it, or give the same settings "
                "to go on"
            )

    def has(self, batch: int) -> bool:
        """Return whether a batch is finished."""
        return self._file(batch).is_file()

    def put(self, batch: int, answers: Sequence[Answer]) -> None:
        """Write a finished batch, as a whole or not at all."""
        rows = [_to_json(answer) for answer in answers]
        write_file(self._file(batch), json.dumps(rows, allow_nan=False).encode())

    def get(self, batch: int) -> list[Answer]:
        """Read a finished batch: its numbers are those that were written, to the last bit.

        Raises:
            DataError: If the file is broken.
        """
        file = self._file(batch)
        try:
            return [_from_json(row) for row in json.loads(file.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file} cannot be read ({error}); remove it, and prepare again") from None

    def remove(self) -> None:
        """Remove the folder, once its answers are in the adapter."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, batch: int) -> Path:
        return self.path / f"{batch:05d}.json"


def _to_json(answer: Answer) -> dict[str, Any]:
    tokens = [{**asdict(token), "alternatives": ()} for token in answer.tokens]
    return {"text": answer.text, "finish": answer.finish, "scores": dict(answer.scores), "tokens": tokens}


def _from_json(row: Mapping[str, Any]) -> Answer:
    tokens = tuple(Token(**{**token, "alternatives": ()}) for token in row["tokens"])
    return Answer(row["text"], tokens, (), row["scores"], risk=0.0, risk_name="", percentile=None, finish=row["finish"])
