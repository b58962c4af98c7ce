"""The base model and its training loop: packed rows, bfloat16 products, Muon for matrices, else AdamW."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.pocket.encode import Rows

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class BaseTraining:
    """Length and speed of the training."""

    steps: int = 2200
    minutes: float | None = None  # the schedule runs by the clock where that ends sooner than the steps
    rows: int = 128  # rows of a step
    length: int = 64  # tokens of a row
    rate: float = 3e-3  # highest learning rate, of AdamW and (by matched update size) of Muon
    decay: float = 0.02
    warmup: int = 100
    cooldown: float = 0.5  # last share of the steps, in which the rate falls linearly to zero
    clip: float = 1.0


def new_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Build a fresh model of 4.7 million parameters (vocabulary 4,096), in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def compute_loss(model: LlamaForCausalLM, trunk: Callable[..., Tensor], rows: Rows) -> Tensor:
    """Return the mean cross-entropy over every real next token, of questions and answers alike."""
    targets = rows.targets()
    loss_mask = targets >= 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = trunk(rows.ids, rows.positions, rows.mask())
        logits = F.linear(hidden[:, :-1][loss_mask], model.lm_head.weight)
    return F.cross_entropy(logits.float(), targets[loss_mask])


def build_trunk(model: LlamaForCausalLM, *, compiled: bool) -> Callable[..., Tensor]:
    """Return the model below its head as one function of ids, positions and mask."""

    def run(ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        out = model.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    return torch.compile(run, dynamic=False) if compiled else run


def build_optimizers(model: LlamaForCausalLM, training: BaseTraining) -> list[torch.optim.Optimizer]:
    """Build the optimizers: Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=training.rate, weight_decay=training.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=training.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(training: BaseTraining, step: int, minutes: float = 0.0) -> float:
    """Return the share of the highest rate: linear warm-up, constant, linear cool-down."""
    done = max(step / training.steps, minutes / training.minutes if training.minutes else 0.0)
    return min((step + 1) / training.warmup, 1.0, max((1 - done) / max(training.cooldown, 1e-9), 0.0))


def train_base(
    model: LlamaForCausalLM,
    stream: Iterator[Rows],
    training: BaseTraining,
    *,
    after_step: Callable[[int, float], bool | None] = lambda _step, _loss: False,
    compiled: bool = True,
) -> tuple[int, int]:
    """Train in place; returns the number of steps and of tokens learnt from.

    ``after_step(step, loss)`` is called after each step; True ends the training.
    """
    model.train()
    trunk = build_trunk(model, compiled=compiled)
    learners = build_optimizers(model, training)
    started = time.monotonic()
    tokens = done = 0
    for step in range(training.steps):
        rows = next(stream)
        share = rate_at(training, step, (time.monotonic() - started) / 60)
        if share <= 0:
            break
        for learner in learners:
            for group in learner.param_groups:
                group["lr"] = training.rate * share
        loss = compute_loss(model, trunk, rows)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {step} is {value}; lower the rate, found {training.rate}")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        for learner in learners:
            learner.step()
            learner.zero_grad(set_to_none=True)
        tokens += int((rows.segments > 0).sum())
        done = step + 1
        if after_step(done, value):
            break
    return done, tokens
