"""The step of ``selfdoubt train``, as an arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.train_arms import Collate, Options, Record


def ours(kind: str, model: nn.Module, tokenizer: Any, options: Options) -> tuple[Any, Collate]:
    """The LightningModule of ``selfdoubt train`` for a wrapper (``lora`` is none), and its way to batches."""
    from selfdoubt.train.data import collate, encode
    from selfdoubt.train.module import RiskAwareModule

    from selfdoubt.train.config import TrainConfig

    config = TrainConfig(
        data="", out="", wrapper="none" if kind == "lora" else kind, batch_size=options.batch,
        max_length=options.length, prompt="alpaca", loss_on="all",
    )  # fmt: skip

    def batch(records: Sequence[Record]) -> tuple[Any, int]:
        made = collate([encode(tokenizer, record, config) for record in records], tokenizer)
        return made, int(made["attention_mask"].sum())

    return RiskAwareModule(model, tokenizer, config), batch
