"""From evaluated folders to an adapter that knows how probable its answers are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfdoubt import storage
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.fields import FieldError
from selfdoubt.lm.adapter import save_adapter
from selfdoubt.lm.answer import reference_quantiles
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.folder import new_folder
from selfdoubt.lm.load import POCKET
from selfdoubt.qa import finish
from selfdoubt.qa import records as files
from selfdoubt.qa.calibrate import calibrate, store
from selfdoubt.qa.records import Record

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


def calibrate_runs(
    folders: Sequence[Path],
    out: Path | None,
    load: Callable[[Mapping[str, Any]], RiskAwareLM],
    *,
    draws: int = 1000,
    **options: Any,
) -> list[str]:
    """Calibrate on one evaluated folder or several, and store the head in the adapter.

    With several folders, each is a topic of its own: "another domain" is then another set of questions.

    Args:
        folders: Evaluated with the same model.
        out: A new adapter folder; None puts the calibration into the adapter that answered.
        load: The model that a run's settings describe; only called for a new adapter of a model that had none.
        draws: Bootstrap draws of the renewed reports; 0 renews none.
        **options: As for ``calibrate``.

    Returns:
        What to tell on a terminal.

    Raises:
        ConfigError: If the runs are of different models or their answers were made differently, or there is no adapter
            to put the calibration into.
        DataError: If a folder is no run, or holds too few judged answers.
    """
    runs = [finish.read_run(folder) for folder in folders]
    about = runs[0][2]
    for folder, (_, _, other) in zip(folders, runs, strict=True):
        differs = [name for name in MODEL if other.get(name) != about.get(name)]
        if differs:
            raise ConfigError(f"{folder} was answered by another {differs[0]} than {folders[0]}; calibrate each alone")
    target = _check_target(about, out, folders)
    records = [_named(r, folder, len(runs)) for folder, (own, _, _) in zip(folders, runs, strict=True) for r in own]
    made = _conditions([run for _, _, run in runs], folders)
    head, report = calibrate(records, _shared_states([states for _, states, _ in runs]), conditions=made, **options)
    place = store(head, target) if out is None else _write(head, about, records, target, load)
    lines = [*report.lines(), *([] if made else [NO_CONDITIONS]), f"stored in {place}"]
    held_out = iter(report.out_of_fold)
    for folder, (own, _, run) in zip(folders, runs, strict=True):
        found = [replace(r, p_correct=next(held_out), p_correct_note=None, abstain=None) for r in own]
        if draws:
            files.save(folder / finish.ANSWERS, found)
            lines += [f"{folder}:", *finish.report(found, run, folder, draws=draws)]
    return lines


def _conditions(runs: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> Conditions | None:
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


def _named(record: Record, folder: Path, runs: int) -> Record:
    if runs == 1:
        return record
    own = record.question
    return replace(record, question=replace(own, id=f"{folder}:{own.id}", topic=str(folder)))


def _shared_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Those that all runs kept."""
    names = [name for name in states[0] if all(name in other for other in states)]
    return {name: torch.cat([own[name] for own in states]) for name in names}


def _check_target(about: Mapping[str, Any], out: Path | None, folders: Sequence[Path]) -> Path:
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
        storage.read_card(Path(str(adapter)))  # refuses LoRA of plain PEFT, which has no card to write into
        return Path(str(adapter))
    return out


def _write(
    head: Calibration,
    about: Mapping[str, Any],
    records: Sequence[Record],
    target: Path,
    load: Callable[[Mapping[str, Any]], RiskAwareLM],
) -> Path:
    """A copy of the adapter that answered, or a new one of the model as it answered."""
    source = None if about.get("adapter") is None else Path(str(about["adapter"]))
    with new_folder(target, {"kind": "calibrated"}, () if source is None else (source,)) as folder:
        if source is not None and (source / storage.CARD).is_file():
            shutil.copytree(source, folder, dirs_exist_ok=True)
            store(head, folder)
        else:
            lm = load(about)
            reference = lm.reference or reference_quantiles(records)
            extra = {"calibration": head.to_json(), "reference": reference}
            save_adapter(lm.model, folder, base=about.get("model"), extra=extra)
    return target / storage.CARD
