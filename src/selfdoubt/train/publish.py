"""Publishes the result of a run: an adapter folder with reference quantiles, tokenizer and model card."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from selfdoubt.errors import ConfigError, PromptError, SelfdoubtError, TargetError
from selfdoubt.lm.adapters import lora
from selfdoubt.lm.adapters.adapter import check_adapter, save_adapter
from selfdoubt.lm.adapters.new_folder import check_free
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.gguf import fetch_gguf, read_gguf_header
from selfdoubt.lm.load import load_skeleton, resolve_model
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.scores import reference_quantiles
from selfdoubt.lm.text.prompt import encode
from selfdoubt.members import Wrapped
from selfdoubt.train.config import TrainConfig
from selfdoubt.version import __version__

CARD = "README.md"
MERGED = "merged"  #: the base with LoRA merged into it, in a folder of the adapter's

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

`{model}`{revision}, licence: {licence}. Sharing this adapter is subject to it, and to the licence of the data.

## Data

`{data}`: {train:,} examples learnt from, {val:,} kept for validation{left_out}.

## Losses

{losses}
{validation}
{reference}

## Settings

```toml
{config}```
"""


@dataclass(frozen=True)
class History:
    """Numbers of a run: losses of its steps in nats, the best validation (None without one), and counts of examples."""

    losses: list[float]
    val_loss: float | None = None
    val_accuracy: float | None = None
    train: int = 0  #: examples learnt from
    val: int = 0  #: examples for validation
    empty: int = 0  #: examples without a response, left out
    cut: int = 0  #: examples cut to the longest length


def publish(config: TrainConfig, model: nn.Module, tokenizer: Any, out: Path, *, history: History, val: Any) -> None:
    """Answer validation questions for their quantiles, and write the folder; ``selfdoubt.json`` comes last.

    Args:
        config: The settings.
        model: Trained.
        tokenizer: Tokenizer with the template that was learnt.
        out: The adapter folder.
        history: Its losses and counts.
        val: Validation examples, from whose questions the reference answers are made.
    """
    questions = [cut_last_answer(json.loads(chat)) for chat in val["chat"][: config.reference]]
    answers: list[Answer] = []
    try:
        if questions:
            answers = answer_all(RiskAwareLM(model.eval(), tokenizer), questions, config)
    except Exception as error:  # a trained model without percentiles is worth more than none
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"selfdoubt: there are no reference answers, so risks have no percentile ({why})", file=sys.stderr)
    _write(config, model, tokenizer, out, history, answers)


def answer_all(lm: RiskAwareLM, questions: list[list[dict[str, str]]], config: TrainConfig) -> list[Answer]:
    """Answer the questions that leave room for an answer."""
    fit = [question for question in questions if has_room(lm, question)]
    return lm.generate(fit, max_tokens=config.reference_tokens, batch_size=config.rows) if fit else []


def has_room(lm: RiskAwareLM, question: list[dict[str, str]]) -> bool:
    """Return whether a question can be encoded and leaves room for an answer in the context."""
    try:
        prompt = encode(lm.tokenizer, question)
    except PromptError:
        return False
    return lm.front.context is None or len(prompt.ids) < lm.front.context


def check_publishable(config: TrainConfig, model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Check that the adapter can be written at the end of a run: write, read and remove a trial of it.

    Args:
        config: The settings.
        model: Before its first step.
        tokenizer: Tokenizer with the template that will be learnt.
        out: The adapter folder; the trial lies in ``run/trial`` in it.

    Raises:
        ConfigError: If the folder cannot be written, or holds a model.
        WrapError: If LoRA cannot be merged though it is asked for, or the model cannot be saved.
        LoadError: If what is written cannot be read.
    """
    if (out / "config.json").is_file():
        raise ConfigError(f"out={str(out)!r} is a model's folder (it has a config.json); give another one")
    if config.merge:
        lora.check_mergeable(model)
        _check_filter(config, model)
        check_free(out / MERGED)
    RiskAwareLM(model, tokenizer)
    trial = out / "run" / "trial"
    try:
        _write(config, model, tokenizer, trial, History([0.0]), [])
        check_adapter(trial)
    except SelfdoubtError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"out={str(out)!r} cannot be written ({why}); give a folder on a disk with room") from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _write(
    config: TrainConfig, model: nn.Module, tokenizer: Any, out: Path, history: History, answers: list[Answer]
) -> None:
    extra: dict[str, Any] = {"training": {"config": config.to_json(), **asdict(history)}}
    if answers:
        extra["reference"] = reference_quantiles(answers)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    (out / CARD).write_text(write_model_card(config, history, len(answers)), encoding="utf-8")
    save_adapter(model, out, base=config.model, revision=config.revision, extra=extra)


def _check_filter(config: TrainConfig, model: nn.Module) -> None:
    """Check that a wrapper's filter picks the same layers without LoRA; only the base's config is read.

    Raises:
        ConfigError: If it picks others.
    """
    param_filter = getattr(config.wrapper, "param_filter", None)
    if not isinstance(model, Wrapped) or param_filter is None:
        return
    bare = load_skeleton(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    try:
        leaves = [leaf.name for leaf in model.spec.find(bare)]
    except TargetError:
        leaves = []
    if sorted(leaves) != sorted(model.leaf_names):
        raise ConfigError(
            f"param_filter={param_filter!r} picks other layers once LoRA is merged, so merge=True would change "
            "the answers; use a filter on layer names, e.g. 'q_proj|v_proj'"
        )


def cut_last_answer(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a chat up to its last answer."""
    last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
    return chat[:last]


def write_model_card(config: TrainConfig, history: History, answered: int) -> str:
    """Return the model card: Markdown with the hub's front matter."""
    losses = history.losses
    tail = losses[-max(1, len(losses) // 10) :]
    left_out = [f"{history.empty} left out, having no response within the length"] if history.empty else []
    left_out += [f"{history.cut} cut"] if history.cut else []
    return _TEXT.format(
        model=config.model, wrapper=config.method, out=config.out, data=config.data, version=__version__,
        licence=find_licence(config), revision=f" at {config.revision}" if config.revision else "",
        train=history.train, val=history.val, left_out=f" ({', '.join(left_out)})" if left_out else "",
        losses=(
            f"Nats per token that counts: {losses[0]:.4f} at the first step, {sum(tail) / len(tail):.4f} over the last "
            f"{len(tail)} of {len(losses):,} steps." if losses else "The losses of the steps were not kept."
        ),
        validation=(
            f"Validation: {history.val_loss:.4f}, accuracy of single tokens {history.val_accuracy:.3f}."
            if history.val_loss is not None else "There was no validation."
        ),
        reference=(
            f"Percentiles rank an answer among the model's own answers to {answered} validation questions."
            if answered else "There are no reference answers, so risks have no percentile yet."
        ),
        config=config.to_toml(),
    )  # fmt: skip


def find_licence(config: TrainConfig) -> str:
    """Return the licence that the base model's card or GGUF metadata names, or "unknown"."""
    source = resolve_model(config.model)
    file = fetch_gguf(source, revision=config.revision)
    if file is not None:
        return read_gguf_header(file).licence or "unknown"
    folder = Path(source)
    text = ""
    if (folder / CARD).is_file():
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    elif not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.model, CARD, revision=config.revision)
        text = Path(cached).read_text(encoding="utf-8", errors="replace") if isinstance(cached, str) else ""
    head = re.match(r"---\n(.*?)\n---", text, flags=re.S)
    licence = re.search(r"^license:\s*(\S+)", head[1], flags=re.M) if head else None
    return licence[1] if licence else "unknown"
