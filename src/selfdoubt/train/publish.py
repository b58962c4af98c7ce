"""What a run leaves: an adapter folder with its reference quantiles, its tokenizer and a model card."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from selfdoubt import __version__
from selfdoubt.lm.adapter import save_adapter
from selfdoubt.lm.answer import reference_quantiles
from selfdoubt.lm.load import resolve
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.train.config import TrainConfig, to_toml

CARD = "README.md"

_TEXT = """\
---
base_model: {model}
library_name: selfdoubt
license: {licence}
tags: [selfdoubt, {wrapper}]
---

# {wrapper} on {model}

An adapter of selfdoubt {version}: with it, every token and every answer of the base model comes with a risk.

```sh
selfdoubt ask --adapter {out} "..."
```

```python
from selfdoubt import RiskAwareLM

lm = RiskAwareLM.load(adapter={out!r})
answer = lm.generate("...")
print(answer.text, answer.risk, answer.percentile)
```

## Base

`{model}`{revision}, licence: {licence}. Whoever shares this adapter keeps to it, and to the licence of the data.

## Data

`{data}`: {train:,} examples learnt from, {val:,} kept for validation{left_out}.

## Losses

Nats per token that counts: {first:.4f} at the first step, {last:.4f} over the last {tail} of {steps:,} steps.
{validation}
{reference}

## Settings

```toml
{config}```
"""


def publish(
    config: TrainConfig, model: nn.Module, tokenizer: Any, out: Path, *, history: dict[str, Any], val: Any
) -> None:
    """Answer validation questions for their quantiles, and write the folder; ``selfdoubt.json`` comes last.

    Args:
        config: The settings.
        model: Trained.
        tokenizer: With the template that was learnt.
        out: The adapter folder.
        history: ``losses`` of the steps, ``val_loss`` and ``val_accuracy`` at the best validation (or None), and the
            numbers of examples ``train``, ``val``, ``empty`` and ``cut``.
        val: The validation examples.
    """
    extra: dict[str, Any] = {"training": {"config": asdict(config), **history}}
    questions = [question_of(json.loads(chat)) for chat in val["chat"][: config.reference]]
    answers = []
    if questions:
        lm = RiskAwareLM(model.eval(), tokenizer)
        answers = lm.generate(questions, max_tokens=config.reference_tokens, batch_size=config.batch_size)
        extra["reference"] = reference_quantiles(answers)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    (out / CARD).write_text(card(config, history, len(answers)), encoding="utf-8")
    save_adapter(model, out, base=config.model, revision=config.revision, extra=extra)


def question_of(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """A chat up to its last answer."""
    last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
    return chat[:last]


def card(config: TrainConfig, history: dict[str, Any], answered: int) -> str:
    """The model card, Markdown with the hub's front matter."""
    losses = history["losses"]
    tail = losses[-max(1, len(losses) // 10) :]
    left_out = [
        f"{history[k]} {why}"
        for k, why in (("empty", "left out, having no response within the length"), ("cut", "cut"))
        if history[k]
    ]
    return _TEXT.format(
        model=config.model, wrapper=config.wrapper, out=config.out, data=config.data, version=__version__,
        licence=licence_of(config), revision=f" at {config.revision}" if config.revision else "",
        train=history["train"], val=history["val"], left_out=f" ({', '.join(left_out)})" if left_out else "",
        first=losses[0], last=sum(tail) / len(tail), tail=len(tail), steps=len(losses),
        validation=(
            f"Validation: {history['val_loss']:.4f}, accuracy of single tokens {history['val_accuracy']:.3f}."
            if history["val_loss"] is not None else "There was no validation."
        ),
        reference=(
            f"Percentiles rank an answer among the model's own answers to {answered} validation questions."
            if answered else "There are no reference answers, so risks have no percentile yet."
        ),
        config=to_toml(config),
    )  # fmt: skip


def licence_of(config: TrainConfig) -> str:
    """The licence that the base model's card names, or "unknown"."""
    folder = Path(resolve(config.model))
    text = ""
    if (folder / CARD).is_file():
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    elif not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.model, CARD, revision=config.revision)
        text = Path(cached).read_text(encoding="utf-8", errors="replace") if isinstance(cached, str) else ""
    head = re.match(r"---\n(.*?)\n---", text, flags=re.S)
    found = re.search(r"^license:\s*(\S+)", head[1], flags=re.M) if head else None
    return found[1] if found else "unknown"
