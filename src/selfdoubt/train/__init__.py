"""Fine-tune a language model that knows its risk: ``fit(TrainConfig(...))``, or ``selfdoubt train``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.train.config import TrainConfig
    from selfdoubt.train.datamodule import InstructionData
    from selfdoubt.train.module import RiskAwareModule
    from selfdoubt.train.run import fit

__all__ = ["InstructionData", "RiskAwareModule", "TrainConfig", "fit"]

_HOMES = {"TrainConfig": "config", "InstructionData": "datamodule", "fit": "run", "RiskAwareModule": "module"}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can list its flags without importing Lightning.
    if name in _HOMES:
        return getattr(import_module(f"selfdoubt.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'selfdoubt.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
