"""The conditions of a calibration: the prompts, decoding and model that its answers were made with.

A probability that was learnt from one kind of answers says nothing about another: ``Conditions`` are stored with a
calibration, and an answer that was made otherwise gets a note instead of a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from selfdoubt import density, storage
from selfdoubt.compat import is_beneath_adapter, is_lora_weight
from selfdoubt.fields import anything, choice, listing, nonempty, number, optional, record, string, table, whole
from selfdoubt.lm.text.prompt_form import CHAT, RAW, TEXT
from selfdoubt.members import Wrapped
from selfdoubt.rows import list_added_names
from selfdoubt.wrapping import get_base_name

#: The most probable token each time; drawn; picked among given choices; existing text.
Made = Literal["greedy", "sampled", "choice", "given"]
#: Numbers of a tensor that are kept, and the greatest relative distance (L2) between those of the same model: rounding
#: to bfloat16 moves each by at most 2^-9.
SAMPLED, TOLERANCE = 16, 5e-3
#: Settings of a wrapper that change no number.
_SILENT = ("verbose", "symbolic_trace")
#: The meaning of settings that are None, or missing in conditions of an earlier version.
_IMPLIED = {"answer_from": "mean", "start": "prompt"}
_AGAIN = "run `selfdoubt evaluate` and `selfdoubt calibrate` with this model"


@dataclass(frozen=True)
class Origin:
    """The origin of one answer: the way in which its tokens were chosen."""

    made: Made
    form: str = CHAT  #: form of its prompt, see ``selfdoubt.lm.text.prompt_form``
    temperature: float = 0.0
    top_p: float = 1.0
    stop: str | None = None  #: the caller's text or token that ended it; None if the model ended it itself
    end_gap: float = 0.0  #: log-probability of the most probable token at its end less that of the end, nats, >= 0


@dataclass(frozen=True)
class Conditions:
    """The conditions under which the answers of a calibration were made: prompts, decoding, model."""

    made: Made = "greedy"
    temperature: float = 0.0  #: temperature of sampled answers
    top_p: float = 1.0
    forms: tuple[str, ...] = (CHAT,)  #: forms of their prompts
    stops: tuple[str, ...] = ()  #: texts that ended some of them
    cut: int | None = None  #: fewest tokens of an answer that was cut at max tokens; None: all were whole
    wrappers: tuple[Mapping[str, Any], ...] = ()  #: settings of the wrappers, from the innermost outwards
    base: Mapping[str, tuple[float, ...]] = field(
        default_factory=dict
    )  #: a few weights by name, see ``sketch_weights``

    @classmethod
    def of_model(cls, model: nn.Module, **more: Any) -> Conditions:
        """Return the conditions of answers that this model gives; ``more`` sets other fields."""
        return cls(wrappers=read_wrapper_settings(model), base=sketch_weights(model), **more)

    def refuse_model(self, model: nn.Module) -> str | None:
        """Return why this calibration says nothing about a model's answers; None where it does."""
        if not _alike(self.wrappers, read_wrapper_settings(model)):
            return f"the calibration was made with another wrapper; {_AGAIN}"
        if not _same_base(self.base, sketch_weights(model, self.base)):
            return f"the calibration was made for another base model; {_AGAIN}"
        return None

    def refuse_question(self, origin: Origin) -> str | None:
        """Return why this calibration says nothing about a question that is asked so; None where it does.

        The question alone does not say how its answer is chosen: of greedy answers, it is about the greedy one.
        """
        if origin.form not in self.forms:
            return _of_form(origin.form, self.forms)
        drawn = origin.made == "sampled" and (origin.temperature, origin.top_p) == (self.temperature, self.top_p)
        if self.made == "sampled" and not drawn:
            return (
                f"the calibration learnt from answers drawn at temperature {self.temperature:g} and top_p "
                f"{self.top_p:g}; ask with the same"
            )
        if "choice" in (self.made, origin.made) and self.made != origin.made:
            return f"the calibration learnt from {_MADE[self.made]}, not from {_MADE[origin.made]}; {_AGAIN}"
        return None

    def refuse_answer(self, origin: Origin, finish: str, tokens: int) -> str | None:
        """Return why this calibration says nothing about an answer of this origin; None where it does.

        ``Calibration.estimate`` checks that the answer is near the one that the model itself would give.
        """
        if note := self.refuse_question(origin):
            return note
        if self.made == "given" != origin.made:
            return f"the calibration learnt from {_MADE[self.made]}, not from {_MADE[origin.made]}; {_AGAIN}"
        if origin.stop is not None and origin.stop not in self.stops:
            return f"the answer was ended by {origin.stop!r}, which the calibration has not seen; ask without this stop"
        if finish == "length" and (self.cut is None or tokens < self.cut):
            return f"the answer was cut after {tokens} tokens, which the calibration has not seen; allow more tokens"
        return None

    def join(self, other: Conditions) -> Conditions | None:
        """Return the conditions of both runs' answers together; None where they were not made alike."""
        cuts = [cut for cut in (self.cut, other.cut) if cut is not None]
        both = replace(
            self,
            forms=tuple(sorted({*self.forms, *other.forms})),
            stops=tuple(sorted({*self.stops, *other.stops})),
            cut=min(cuts, default=None),
        )
        same = replace(other, forms=both.forms, stops=both.stops, cut=both.cut, base=self.base) == both
        return both if same and _same_base(self.base, other.base) else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Conditions:
        """Return the conditions that ``to_json`` described.

        Raises:
            FieldError: If an entry is missing, unknown, of a wrong kind or out of range.
        """
        return cls(**CONDITIONS_ENTRY(entry, "conditions"))


#: Kinds of the entries of stored conditions.
CONDITIONS_ENTRY = record(
    {"made": choice(*get_args(Made))},
    {
        "temperature": number(0),
        "top_p": number(0, 1),
        "forms": listing(nonempty),
        "stops": listing(string),
        "cut": optional(whole()),
        "wrappers": listing(table(anything)),
        "base": table(listing(number())),
    },
)

_MADE: dict[str, str] = {
    "greedy": "the model's own answers",
    "sampled": "answers that were drawn",
    "choice": "answers picked among choices",
    "given": "given texts",
}


def read_wrapper_settings(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the wrappers' settings as plain data, from the innermost outwards; without a density's.

    A density changes no answer, and none of their other scores.
    """
    wrappers: list[dict[str, Any]] = []
    while isinstance(model, Wrapped):
        settings = storage.to_json(model.spec)
        if not isinstance(model.spec, density.Wrapper):
            settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k not in _SILENT}
            wrappers.append({k: _IMPLIED.get(k) if v is None else v for k, v in settings.items()})
        model = model.module
    return tuple(reversed(wrappers))


def sketch_weights(model: nn.Module, names: Mapping[str, Any] | None = None) -> dict[str, tuple[float, ...]]:
    """Return a few weights of a base model: enough to distinguish it from others of equal shape.

    They are ``SAMPLED`` numbers each of its embeddings, its last norm and three of its matrices. Quantised weights and
    those beneath LoRA are left out, since they differ where the model is the same.

    Args:
        model: Wrapped or plain.
        names: Names of the parameters to read, e.g. those of another sketch; None chooses them.
    """
    added = set(list_added_names(model))
    parameters = {get_base_name(model, name): p for name, p in model.named_parameters() if name not in added}
    parameters = {name: p for name, p in parameters.items() if not is_lora_weight(name)}
    if names is None:
        norms = [name for name, p in parameters.items() if p.ndim == 1]
        tables = [name for name, p in parameters.items() if p.ndim > 1]
        names = dict.fromkeys([*norms[-1:], *(tables[(len(tables) - 1) * k // 4] for k in range(4) if tables)])
    readable = {
        name: parameters[name]
        for name in names
        if name in parameters and _is_plain(parameters[name]) and not is_beneath_adapter(name)
    }
    return {name: _numbers(p) for name, p in readable.items()}


def _is_plain(p: Tensor) -> bool:
    return p.is_floating_point() and p.element_size() > 1 and not p.is_meta and p.numel() > 0


@torch.no_grad()
def _numbers(p: Tensor) -> tuple[float, ...]:
    places = torch.linspace(0, p.numel() - 1, min(SAMPLED, p.numel()), dtype=torch.float64).long()
    flat = p.detach().flatten()[places.to(p.device)]
    return tuple(float(f"{v:.6g}") for v in flat.double().tolist())


def _same_base(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> bool:
    """Return whether two sketches are of one model; where they share no weight, only if one has nothing to compare."""
    shared = [name for name in ours if name in theirs]
    return all(_near(ours[name], theirs[name]) for name in shared) and bool(shared or not ours)


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and math.dist(a, b) <= TOLERANCE * math.hypot(*a)


def _alike(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether wrappers have the same settings; one that a version of this program does not know may differ."""

    def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        known = all(a[key] == b[key] for key in a.keys() & b.keys())
        return known and all(a.get(key, meaning) == b.get(key, meaning) for key, meaning in _IMPLIED.items())

    return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def _of_form(form: str, forms: Sequence[str]) -> str:
    if form == TEXT:
        return "the text answers no question; give the question, too"
    if form.startswith(CHAT) and CHAT in forms:
        return "the calibration knows single questions only, without system message, examples or earlier turns"
    if form.startswith(RAW) != any(f.startswith(RAW) for f in forms):
        ours, theirs = ("plain text", "a chat") if form.startswith(RAW) else ("a chat", "plain text")
        return f"the prompt is {ours}, and those of the calibration were {theirs}; ask in the same way"
    return "the prompt has another system message or other examples than the calibration's; ask in the same way"
