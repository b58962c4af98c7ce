"""Fine-tuning of a language model that reports its risk: ``fit(TrainConfig(...))``, or ``selfdoubt train``.

``TrainConfig`` holds the settings, ``fit`` runs them and writes an adapter folder; ``RiskAwareModule`` and
``InstructionData`` are the step and the batches for a Lightning Trainer of your own. ``export_checkpoint`` makes an
adapter of a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

if TYPE_CHECKING:
    from selfdoubt.train.checkpoint import export_checkpoint
    from selfdoubt.train.config import TrainConfig, load_config
    from selfdoubt.train.datamodule import InstructionData
    from selfdoubt.train.module import RiskAwareModule
    from selfdoubt.train.run import fit

__all__ = ["InstructionData", "RiskAwareModule", "TrainConfig", "export_checkpoint", "fit", "load_config"]

_HOMES = {
    "InstructionData": "datamodule",
    "RiskAwareModule": "module",
    "TrainConfig": "config",
    "export_checkpoint": "checkpoint",
    "fit": "run",
    "load_config": "config",
}

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
