"""From evaluated folders to an adapter that knows how probable its answers are."""

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

#: The entry of ``run.json`` that says how its answers were made.
CONDITIONS = "conditions"
NO_CONDITIONS = (
    "warning: a run of an earlier version does not say how its answers were made, so that prompts and models which it "
    "did not see get a number, too; evaluate again to change this"
)
#: What says which model answered.
MODEL = ("model", "adapter", "wrapper", "quantize")


def read_conditions(runs: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> Conditions | None:
    """Return how the answers of all runs were made; None where a run, of an earlier version, does not say."""
    entries = [run.get(CONDITIONS) for run in runs]
    if None in entries:
        return None
    try:
        found = [Conditions.from_json(entry) for entry in entries if entry is not None]
    except FieldError as error:
        raise DataError(f"run.json has conditions that cannot be read ({error}); evaluate again") from None
    joined = found[0]
    for folder, own in zip(folders[1:], found[1:], strict=True):
        both = joined.joined(own)
        if both is None:
            raise ConfigError(
                f"the answers of {folder} ({own.made}) were made otherwise than those of {folders[0]} ({joined.made}), "
                "or by another model; calibrate each alone"
            )
        joined = both
    return joined


def name_by_run(record: Record, folder: Path, runs: int) -> Record:
    """Return a record whose id and topic name its run, where there are several runs."""
    if runs == 1:
        return record
    own = record.question
    return replace(record, question=replace(own, id=f"{folder}:{own.id}", topic=str(folder)))


def join_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Join the hidden states that all runs kept, by name."""
    names = [name for name in states[0] if all(name in other for other in states)]
    return {name: torch.cat([own[name] for own in states]) for name in names}


def check_target(about: Mapping[str, Any], out: Path | None, folders: Sequence[Path]) -> Path:
    """Return the adapter folder to write, or raise ``ConfigError`` where there is none to write into."""
    adapter = about.get("adapter")
    if adapter is None and about.get("wrapper") == "auto" and about.get("model") != POCKET:
        raise ConfigError(
            f"{folders[0]} was answered by an earlier version, in which 'auto' meant three untrained voters; they made "
            "answers worse and are gone: evaluate again"
        )
    if out is None and adapter is None:
        raise ConfigError(
            f"{folders[0]} was answered without an adapter of yours; say where to write one, e.g. --out adapter"
        )
    if out is None:
        storage.read_manifest(Path(str(adapter)))  # refuses LoRA of plain PEFT, which has no manifest to write into
        return Path(str(adapter))
    return out


def write_adapter(
    head: Calibration,
    about: Mapping[str, Any],
    records: Sequence[Record],
    target: Path,
    load: Callable[[Mapping[str, Any]], RiskAwareLM],
) -> Path:
    """Write a copy of the adapter that answered, or a new one of the model as it answered, and return its manifest."""
    source = None if about.get("adapter") is None else Path(str(about["adapter"]))
    with new_folder(target, {"kind": "calibrated"}, () if source is None else (source,)) as folder:
        if source is not None and (source / storage.MANIFEST).is_file():
            shutil.copytree(source, folder, dirs_exist_ok=True)
            store_calibration(head, folder)
        else:
            lm = load(about)
            reference = lm.reference or reference_quantiles(records)
            extra = {"calibration": head.to_json(), "reference": reference}
            save_adapter(lm.model, folder, base=about.get("model"), extra=extra)
    return target / storage.MANIFEST
