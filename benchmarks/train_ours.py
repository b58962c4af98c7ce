"""The step of ``selfdoubt train``, as an arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.train_arms import Collate, Options, Record
from selfdoubt import sample, sculpt, vote
from selfdoubt.train.batches import Batch, collate, pack_rows, round_up
from selfdoubt.train.build import train_in_float32, wrap_base
from selfdoubt.train.config import TrainConfig, WrapperSettings
from selfdoubt.train.devices import choose_padding
from selfdoubt.train.encode import EncodedChat, encode_chat, prepare_tokenizer
from selfdoubt.train.module import RiskAwareModule
from selfdoubt.wrapping import innermost

WRAPPERS: dict[str, WrapperSettings | None] = {
    "vote": vote.Wrapper(rank=16),
    "sample": sample.Wrapper(),
    "sculpt": sculpt.Wrapper(),
    "lora": None,
}


def ours(kind: str, model: nn.Module, tokenizer: Any, options: Options) -> tuple[Any, Collate]:
    """Return the LightningModule of ``selfdoubt train`` for a kind, and its way to batches.

    A kind is a wrapper (``lora`` is none) with any of ``packed``, ``compiled`` and ``checkpointed`` behind it. Every
    token counts, as in the other arms: by default only those of the response would.
    """
    name, *ways = kind.split("-")
    config = TrainConfig(
        data="", out="", wrapper=WRAPPERS[name], batch_size=options.batch, max_length=options.length,
        prompt="alpaca", loss_on="all", pack="packed" in ways, compile="compiled" in ways,
        checkpointing="checkpointed" in ways,
    )  # fmt: skip
    prepare_tokenizer(tokenizer, config.prompt)
    wrapped = wrap_base(model, config)
    train_in_float32(wrapped)
    if config.checkpointing:
        base: Any = innermost(wrapped)
        base.gradient_checkpointing_enable({"use_reentrant": False})

    def batch(rows: Sequence[Sequence[Record]]) -> tuple[Batch, int]:
        examples = [[encode_record(tokenizer, record, options.length)._asdict() for record in row] for row in rows]
        longest = max(sum(len(e["ids"]) for e in row) for row in examples)
        width = config.max_length if config.pack else round_up(longest, choose_padding(config), config.max_length)
        counted = sum(sum(e["counts"]) for row in examples for e in row)
        made = collate(examples, counted, width, packed=config.pack)
        return made, made.tokens

    return RiskAwareModule(wrapped, config), batch


def encode_record(tokenizer: Any, record: Record, length: int) -> EncodedChat:
    """Return a record's ids as training reads them; every token counts."""
    return encode_chat(tokenizer, chat(record), loss_on="all", max_length=length)


def pack(records: Sequence[Record], folder: str, length: int) -> list[list[Record]]:
    """Return rows of several records, of at most ``length`` tokens each, as training packs them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prepare_tokenizer(tokenizer, "alpaca")
    lengths = torch.tensor([len(encode_record(tokenizer, record, length).ids) for record in records])
    return [[records[i] for i in row] for row in pack_rows(range(len(records)), lengths, length)]


def chat(record: Record) -> list[dict[str, str]]:
    """Return a record as the chat that training reads."""
    words = [{"role": "input", "content": record["input"]}] if record["input"] else []
    question = {"role": "user", "content": record["instruction"]}
    return [question, *words, {"role": "assistant", "content": record["output"]}]
