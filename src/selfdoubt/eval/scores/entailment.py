"""Entailment between two answers, judged by a Hugging Face model for natural language inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from selfdoubt.errors import ConfigError, LoadError, NonFiniteError, require


@dataclass(frozen=True)
class SameMeaning:
    """Each answer entails the other, read after the question (Kuhn et al., 2023). Loads the model on first use, once.

    A text entails another where entailment is the most probable of the model's labels.
    """

    model: str  #: a folder or a name on the hub, e.g. microsoft/deberta-large-mnli
    batch_size: int = 32
    revision: str | None = None
    device: str | None = None  #: None takes a GPU where there is one

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")

    def __call__(self, pairs: Sequence[tuple[str, str]], question: str = "", /) -> list[bool]:
        """Compare each pair.

        Raises:
            LoadError: If the model cannot be loaded.
            ConfigError: If none of its labels, or several, are entailment.
            NonFiniteError: If it gives NaN.
        """
        read = [(f"{question} {a}".strip(), f"{question} {b}".strip()) for a, b in pairs]
        directed = list(dict.fromkeys([*read, *((b, a) for a, b in read)]))
        # Pairs of similar length share a batch; the sort is stable.
        directed.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        entails: dict[tuple[str, str], bool] = {}
        for first in range(0, len(directed), self.batch_size):
            part = directed[first : first + self.batch_size]
            entails.update(zip(part, self._entails(part), strict=True))
        return [entails[a, b] and entails[b, a] for a, b in read]

    def _entails(self, pairs: list[tuple[str, str]]) -> list[bool]:
        import torch

        model, tokenizer, label = _load(self.model, self.revision, self.device)
        inputs = tokenizer(
            [a for a, _ in pairs], [b for _, b in pairs], padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**inputs.to(model.device)).logits
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"the entailment model {self.model} gives NaN or infinite logits; load it in float32")
        return [int(i) == label for i in logits.argmax(-1)]


def find_entailment_class(labels: dict[int, str], model: str) -> int:
    """Return the index of the class "entailment", by the labels in a model's configuration.

    Raises:
        ConfigError: If none begins with "entail", or several do.
    """
    labelled = [i for i, name in labels.items() if str(name).lower().startswith("entail")]
    if len(labelled) != 1:
        raise ConfigError(
            f"{model} has the labels {', '.join(map(str, labels.values()))}, and exactly one must begin with 'entail'; "
            "take a model for natural language inference, or fix id2label in its config.json"
        )
    return int(labelled[0])


@cache
def _load(name: str, revision: str | None, device: str | None) -> tuple[Any, Any, int]:
    import torch

    transformers = require("transformers", "lm")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name, revision=revision)
    except Exception as error:  # loading raises many kinds of errors
        text = " ".join(str(error).split())[:160]
        raise LoadError(
            f"no model for entailment can be loaded from {name!r} ({type(error).__name__}: {text})"
        ) from None
    label = find_entailment_class(model.config.id2label, name)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(place), tokenizer, label
