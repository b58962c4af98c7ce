"""Writes the calibration of evaluated folders into an adapter, whose answers then come with a ``p_correct``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfdoubt import storage
from selfdoubt.calibration.fit import store_calibration
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval.records import Record
from selfdoubt.eval.settings import Run
from selfdoubt.fields import FieldError
from selfdoubt.lm.adapters.adapter import save_adapter
from selfdoubt.lm.adapters.new_folder import new_folder
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.load import POCKET
from selfdoubt.lm.scores import reference_quantiles

if TYPE_CHECKING:
    from torch import Tensor

    from selfdoubt.lm.calibration import Calibration
    from selfdoubt.lm.model import RiskAwareLM

NO_CONDITIONS = (
    "warning: a run of an earlier version does not say how its answers were made, so that prompts and models which it "
    "did not see get a number, too; evaluate again to change this"
)
#: Settings that say which model answered.
SAME_MODEL = ("model", "adapter", "wrapper", "quantize", "answer_from")


def read_conditions(runs: Sequence[Run], folders: Sequence[Path]) -> Conditions | None:
    """Return the conditions under which all runs' answers were made; None if a run of an earlier version has none."""
    entries = [run.conditions for run in runs]
    if None in entries:
        return None
    try:
        conditions = [Conditions.from_json(entry) for entry in entries if entry is not None]
    except FieldError as error:
        raise DataError(f"run.json has conditions that cannot be read ({error}); evaluate again") from None
    joined = conditions[0]
    for folder, other in zip(folders[1:], conditions[1:], strict=True):
        both = joined.join(other)
        if both is None:
            raise ConfigError(
                f"the answers of {folder} ({other.made}) were made otherwise than those of {folders[0]} "
                f"({joined.made}), or by another model; calibrate each alone"
            )
        joined = both
    return joined


def name_by_run(record: Record, folder: Path, runs: int) -> Record:
    """Return a record whose id and topic name its run, where there are several runs."""
    if runs == 1:
        return record
    question = replace(record.question, id=f"{folder}:{record.question.id}", topic=str(folder))
    return replace(record, question=question)


def join_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Join the hidden states that all runs kept, by name."""
    names = [name for name in states[0] if all(name in other for other in states)]
    return {name: torch.cat([other[name] for other in states]) for name in names}


def check_target(run: Run, out: Path | None, folders: Sequence[Path]) -> Path:
    """Return the adapter folder to write, or raise ``ConfigError`` where there is none to write into."""
    adapter = run.adapter
    if adapter is None and run.wrapper == "auto" and run.model != POCKET:
        raise ConfigError(
            f"{folders[0]} was answered by an earlier version, in which 'auto' meant three untrained voters; they made "
            "answers worse and are gone: evaluate again"
        )
    if out is not None:
        return out
    if adapter is None:
        raise ConfigError(
            f"{folders[0]} was answered without an adapter of yours; say where to write one, e.g. --out adapter"
        )
    storage.read_manifest(Path(adapter))  # refuses LoRA of plain PEFT, which has no manifest to write into
    return Path(adapter)


def write_adapter(
    head: Calibration,
    run: Run,
    records: Sequence[Record],
    target: Path,
    load: Callable[[Run], RiskAwareLM],
) -> Path:
    """Write the calibrated adapter, a copy of the one that answered or a new one; return the path of its manifest."""
    source = None if run.adapter is None else Path(run.adapter)
    with new_folder(target, {"kind": "calibrated"}, () if source is None else (source,)) as folder:
        if source is not None and (source / storage.MANIFEST).is_file():
            shutil.copytree(source, folder, dirs_exist_ok=True)
            if run.answer_from is not None:
                _set_answer_from(folder, run.answer_from)
            store_calibration(head, folder)
        else:
            lm = load(run)
            reference = lm.reference or reference_quantiles(records)
            extra = {"calibration": head.to_json(), "reference": reference}
            save_adapter(lm.model, folder, base=run.model, extra=extra)
    return target / storage.MANIFEST


def _set_answer_from(folder: Path, answer_from: str) -> None:
    """Let the adapter in a folder answer as the calibrated answers were made: from the base or the members' mean."""
    manifest = storage.read_manifest(folder)
    wrappers = [
        {**entry, "answer_from": answer_from} if entry["method"] in ("vote", "sample") else entry
        for entry in manifest["wrappers"]
    ]
    storage.write_manifest(folder, {**manifest, "wrappers": wrappers})
