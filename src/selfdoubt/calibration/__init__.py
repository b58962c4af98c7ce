"""Calibration: heads that turn scores into ``p_correct``, and the threshold of a guaranteed accuracy.

They are fitted on judged answers and stored in an adapter.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.calibration.fit import fit_calibration, store_calibration
    from selfdoubt.calibration.quality import CalibrationReport
    from selfdoubt.calibration.threshold import AccuracyGuarantee, explain_no_threshold, find_threshold

__all__ = [
    "AccuracyGuarantee",
    "CalibrationReport",
    "explain_no_threshold",
    "find_threshold",
    "fit_calibration",
    "store_calibration",
]

_HOMES = {
    "fit_calibration": "fit",
    "store_calibration": "fit",
    "CalibrationReport": "quality",
    "AccuracyGuarantee": "threshold",
    "find_threshold": "threshold",
    "explain_no_threshold": "threshold",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can list its flags without importing torch.
    if name in _HOMES:
        return getattr(import_module(f"selfdoubt.calibration.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'selfdoubt.calibration' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
