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
class Plan:
    """How long and how fast to learn."""

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
    """A fresh model of 4.7 million parameters (vocabulary 4,096), in float32."""
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


def loss_of(model: LlamaForCausalLM, trunk: Callable[..., Tensor], rows: Rows) -> Tensor:
    """Mean cross-entropy over every real next token, of questions and answers alike."""
    targets = rows.targets()
    keep = targets >= 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = trunk(rows.ids, rows.positions, rows.mask())
        logits = F.linear(hidden[:, :-1][keep], model.lm_head.weight)
    return F.cross_entropy(logits.float(), targets[keep])


def trunk_of(model: LlamaForCausalLM, *, compiled: bool) -> Callable[..., Tensor]:
    """The model below its head as one function of ids, positions and mask."""

    def run(ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        out = model.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    return torch.compile(run, dynamic=False) if compiled else run


def optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=plan.rate, weight_decay=plan.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(plan: Plan, step: int, minutes: float = 0.0) -> float:
    """Share of the highest rate: linear warm-up, constant, linear cool-down."""
    done = max(step / plan.steps, minutes / plan.minutes if plan.minutes else 0.0)
    return min((step + 1) / plan.warmup, 1.0, max((1 - done) / max(plan.cooldown, 1e-9), 0.0))


def fit(
    model: LlamaForCausalLM,
    stream: Iterator[Rows],
    plan: Plan,
    *,
    after_step: Callable[[int, float], bool | None] = lambda _step, _loss: False,
    compiled: bool = True,
) -> tuple[int, int]:
    """Train in place; returns the number of steps and of tokens learnt from.

    ``after_step(step, loss)`` is called after each step; True ends the training.
    """
    model.train()
    trunk = trunk_of(model, compiled=compiled)
    learners = optimizers(model, plan)
    started = time.monotonic()
    tokens = done = 0
    for step in range(plan.steps):
        rows = next(stream)
        share = rate_at(plan, step, (time.monotonic() - started) / 60)
        if share <= 0:
            break
        for learner in learners:
            for group in learner.param_groups:
                group["lr"] = plan.rate * share
        loss = loss_of(model, trunk, rows)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {step} is {value}; lower the rate, found {plan.rate}")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        for learner in learners:
            learner.step()
            learner.zero_grad(set_to_none=True)
        tokens += int((rows.segments > 0).sum())
        done = step + 1
        if after_step(done, value):
            break
    return done, tokens
