"""Preparation: make a model risk-aware from questions without labels and without training it.

The model answers questions; the quantiles of its scores become the reference of an adapter that needs no weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

if TYPE_CHECKING:
    from selfdoubt.preparation.config import PreparationConfig
    from selfdoubt.preparation.run import Preparation, prepare

__all__ = ["Preparation", "PreparationConfig", "prepare"]

_HOMES = {"Preparation": "run", "PreparationConfig": "config", "prepare": "run"}

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
