"""Calibration: heads that turn scores into ``p_correct``, and the threshold of a guaranteed accuracy.

They are fitted on judged answers and stored in an adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

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

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
