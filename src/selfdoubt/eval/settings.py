"""The settings of an evaluated run, as its ``run.json`` holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from selfdoubt.errors import DataError


@dataclass(frozen=True)
class Cost:
    """The cost of one step of a run, e.g. of the answers or of the samples."""

    passes: float  #: forward passes per question
    seconds: float  #: for the whole run


@dataclass(frozen=True)
class Run:
    """Settings of a run: its questions, its model, its judge, and the threshold that a calibration set.

    Keys of other versions are kept in ``more`` and written back.
    """

    model: str | None = None  #: a folder, a GGUF file, a hub name or "pocket"
    adapter: str | None = None  #: a folder
    wrapper: str | None = None  #: as ``--wrapper`` takes it
    dtype: str | None = None
    quantize: str | None = None
    risk: str | None = None  #: name of the answer score that is the risk, also of samples
    answer_from: str | None = None  #: "base" or "mean", where it was asked for
    data: str | None = None
    task: str | None = None
    seed: int | None = None
    conditions: Mapping[str, Any] | None = None  #: as ``Conditions.to_json`` writes them
    judge: str | None = None
    costs: Mapping[str, Cost] | None = None  #: "answer", and "samples", "agreement", "p_true" where they were asked for
    threshold: float | None = None  #: least p_correct of an answer from which the model does not abstain
    promise: Mapping[str, Any] | None = None  #: as ``AccuracyGuarantee.to_json`` writes it
    more: Mapping[str, Any] = field(default_factory=dict)  #: keys of other versions
    #: Keys that are written even where they are None, before all others.
    written: tuple[str, ...] = field(
        default=("model", "adapter", "wrapper", "dtype", "quantize", "risk", "data", "task"), repr=False, compare=False
    )

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the keys that were read, in their order, then the others that are set."""
        values = {**{name: getattr(self, name) for name in KEYS}, **self.more}
        if self.costs is not None:
            values["costs"] = {name: asdict(cost) for name, cost in self.costs.items()}
        names = [*self.written, *(name for name in values if name not in self.written and values[name] is not None)]
        return {name: values[name] for name in names}

    @classmethod
    def parse(cls, entries: Mapping[str, Any]) -> Run:
        """Return the settings that ``to_json`` described.

        Raises:
            DataError: If an entry is of another kind.
        """
        known = {name: entries[name] for name in KEYS if entries.get(name) is not None}
        for name, value in known.items():
            if not isinstance(value, KEYS[name]) or isinstance(value, bool):
                raise DataError(f"{name} must be {_KINDS[KEYS[name]]}, found {value!r:.60}")
        if "costs" in known:
            known["costs"] = {name: _parse_cost(name, cost) for name, cost in known["costs"].items()}
        more = {name: value for name, value in entries.items() if name not in KEYS}
        return cls(**known, more=more, written=tuple(entries))

    def with_guarantee(self, threshold: float | None, promise: Mapping[str, Any] | None) -> Run:
        """Return the settings with the threshold of a calibration in place of an earlier one; None for none."""
        written = tuple(name for name in self.written if name not in ("threshold", "promise"))
        return replace(self, threshold=threshold, promise=promise, written=written)


#: Each key of ``run.json`` that this version writes, and the kind of its value.
KEYS: dict[str, Any] = {
    **dict.fromkeys((f.name for f in fields(Run) if f.name not in ("more", "written")), str),
    "seed": int,
    "threshold": (int, float),
    **dict.fromkeys(("conditions", "costs", "promise"), Mapping),
}
_KINDS = {str: "text", int: "a whole number", (int, float): "a number", Mapping: "an object"}


def _parse_cost(name: str, entry: Any) -> Cost:
    try:
        return Cost(passes=entry["passes"], seconds=entry["seconds"])
    except (KeyError, TypeError):
        raise DataError(f"the costs of {name} must be passes and seconds, found {entry!r:.60}") from None
