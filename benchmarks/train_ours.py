"""The step of ``selfdoubt train``, as an arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.train_arms import Collate, Options, Record
from selfdoubt import sample, sculpt, vote
from selfdoubt.train.batches import Batch, collate
from selfdoubt.train.build import train_in_float32, wrap_base
from selfdoubt.train.config import TrainConfig, WrapperSettings
from selfdoubt.train.encode import encode_chat, prepare_tokenizer
from selfdoubt.train.module import RiskAwareModule

WRAPPERS: dict[str, WrapperSettings | None] = {
    "vote": vote.Wrapper(rank=16),
    "sample": sample.Wrapper(),
    "sculpt": sculpt.Wrapper(),
    "lora": None,
}


def ours(kind: str, model: nn.Module, tokenizer: Any, options: Options) -> tuple[Any, Collate]:
    """Return the LightningModule of ``selfdoubt train`` for a wrapper (``lora`` is none), and its way to batches.

    Every token counts, as in the other arms: by default only those of the response would.
    """
    config = TrainConfig(
        data="", out="", wrapper=WRAPPERS[kind], batch_size=options.batch, max_length=options.length,
        prompt="alpaca", loss_on="all",
    )  # fmt: skip
    prepare_tokenizer(tokenizer, config.prompt)
    wrapped = wrap_base(model, config)
    train_in_float32(wrapped)

    def batch(records: Sequence[Record]) -> tuple[Batch, int]:
        limits: Any = {"loss_on": config.loss_on, "max_length": config.max_length}
        examples = [encode_chat(tokenizer, chat(r), **limits) for r in records]
        made = collate([[e._asdict()] for e in examples], sum(sum(e.counts) for e in examples))
        return made, made.tokens

    return RiskAwareModule(wrapped, config), batch


def chat(record: Record) -> list[dict[str, str]]:
    """Return a record as the chat that training reads."""
    words = [{"role": "input", "content": record["input"]}] if record["input"] else []
    question = {"role": "user", "content": record["instruction"]}
    return [question, *words, {"role": "assistant", "content": record["output"]}]
