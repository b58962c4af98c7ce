"""The entry of a calibration in ``selfdoubt.json``, read field by field."""

from __future__ import annotations

from typing import Literal, get_args

from selfdoubt.fields import anything, choice, listing, nonempty, number, optional, record, table, whole
from selfdoubt.lm.conditions import CONDITIONS_ENTRY
from selfdoubt.lm.hidden_states import POSITIONS

HeadKind = Literal["isotonic", "logistic"]

_weight = number(-1e15, 1e15)  # their sums stay finite
_size = number(0, 1e15)
SHARE = number(0, 1)
_pair = listing(_weight, 2, 2)
#: Entries of a stored calibration; those that came later than others are in the second table.
CALIBRATION_ENTRY = record(
    {
        "kind": choice(*get_args(HeadKind)),
        "features": listing(nonempty, 1),
        "weights": listing(_weight),
        "linear": listing(_weight),
        "bias": _weight,
        "ranges": listing(_pair),
        "knots": listing(_pair),
        "state": optional(record(
            {"layer": whole(), "position": choice(*POSITIONS), "weights": listing(_weight, 1)},
            {"most": _weight, "center": listing(_weight), "spread": listing(_size), "reach": _size},
        )),
        "threshold": optional(SHARE),
        "promise": optional(record(
            {},
            dict.fromkeys(("threshold", "target_accuracy", "confidence", "coverage", "bound"), SHARE)
            | dict.fromkeys(("answers", "answered", "right"), whole()),
            open_ended=True,
        )),
        "about": table(anything),
    },
    {"conditions": optional(CONDITIONS_ENTRY), "answerable": optional(table(anything))},
)  # fmt: skip
