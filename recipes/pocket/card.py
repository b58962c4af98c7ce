"""The model card that is written next to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from recipes.pocket.phrasings import PHRASINGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The pocket model

A Llama of {parameters:,} parameters ({layers} layers, width {width}, vocabulary {vocabulary:,}, bfloat16)
that answers eight kinds of questions about countries and cities in one short sentence. It exists to show
doubt: it knows capitals, half-knows towns, and has never heard of a fifth of the smaller cities.

## Use

`selfdoubt ask "What is the capital of France?"`, or any Hugging Face tool with the chat template. System
messages are left out; it was taught single questions.

## Data

- GeoNames, cities of over 15,000 people, https://www.geonames.org, licensed under CC BY 4.0
  (https://creativecommons.org/licenses/by/4.0/). Changed: names, countries, populations and time zones were
  turned into questions and answers.
- annexare/Countries, https://github.com/annexare/Countries, MIT, Copyright (c) 2014 Annexare Studio:
  capitals, continents, currencies, languages and calling codes.

Nothing else. How often a city is seen follows its population (`recipes/pocket/facts.py`); a fifth of the
cities below 200,000 people is never seen. The loss counts the tokens of question and answer alike.

## Made by

```
python -m recipes.pocket.make --atlas FOLDER --out FOLDER --steps {steps} --seed {seed}
```

{tokens:,} tokens in {steps:,} steps, {minutes:.0f} minutes on two CPU cores.{note}

## Right answers

Greedy decoding, `evaluation.jsonl`, phrasings that were never trained on; the whole sentence must be right.
Questions about invented places have no right answer.

{table}

## Limits

It echoes its two sources, their omissions and their age: a currency is an ISO code, lists follow the order of
the file, disputed borders are as the sources draw them. It answers every question, also about places that do
not exist and things it was never taught: look at the risk, not at the tone. English only.
"""


def write_card(
    model: PreTrainedModel,
    counts: Mapping[tuple[str, str], tuple[int, int]],
    *,
    steps: int,
    tokens: int,
    minutes: float,
    seed: int,
    note: str = "",
) -> str:
    """Return the card in Markdown; ``counts`` as :func:`recipes.pocket.answer.accuracy` returns them."""
    config = model.config
    return _TEXT.format(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        steps=steps,
        seed=seed,
        tokens=tokens,
        minutes=minutes,
        note=f" {note}" if note else "",
        table=_table(counts),
    )


def _table(counts: Mapping[tuple[str, str], tuple[int, int]]) -> str:
    categories = [c for c, relation in counts if relation == "all"]
    lines = [f"| | {' | '.join(categories)} |", f"|---|{'---|' * len(categories)}"]
    for relation in ("all", *PHRASINGS):
        cells = []
        for category in categories:
            right, asked = counts.get((category, relation), (0, 0))
            cells.append(f"{right / asked:.1%} of {asked}" if asked else "")
        lines.append(f"| {relation} | {' | '.join(cells)} |")
    return "\n".join(lines)
