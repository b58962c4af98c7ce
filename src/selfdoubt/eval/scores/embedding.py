"""Similarity of two answers by a sentence encoder, a Hugging Face model in a folder or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from selfdoubt.errors import ConfigError, LoadError, NonFiniteError, require

#: Cosine from which two answers mean the same. Measured with all-MiniLM-L6-v2, see ``docs/evaluate.md``.
DEFAULT_COSINE = 0.7


@dataclass(frozen=True)
class SameSentence:
    """A cosine of at least ``threshold`` between two answers' embeddings. Loads the encoder on first use, once.

    An embedding is the mean of the last hidden states over a text's tokens (Reimers and Gurevych, 2019,
    "Sentence-BERT"). The question is not read: it would make all answers alike.
    """

    model: str  #: a folder or a name on the hub, e.g. of all-MiniLM-L6-v2
    threshold: float = DEFAULT_COSINE  #: in (0, 1]
    batch_size: int = 32
    device: str | None = None  #: None takes a GPU where there is one

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(
                f"the cosine of answers that mean the same must be above 0, at most 1; got {self.threshold}"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")

    def __call__(self, pairs: Sequence[tuple[str, str]], question: str = "", /) -> list[bool]:
        """Compare each pair.

        Raises:
            LoadError: If the folder holds no encoder.
            NonFiniteError: If it gives NaN.
        """
        return [similarity >= self.threshold for similarity in self.similarity(pairs, question)]

    def similarity(self, pairs: Sequence[tuple[str, str]], _question: str = "", /) -> list[float]:
        """Return the cosine of each pair, in [0, 1]: a negative one counts as 0.

        Raises:
            As the call.
        """
        texts = sorted({text for pair in pairs for text in pair}, key=lambda text: (len(text), text))
        embedded: dict[str, Any] = {}
        for first in range(0, len(texts), self.batch_size):
            part = texts[first : first + self.batch_size]
            embedded.update(zip(part, self._embed(part), strict=True))
        return [1.0 if a == b else min(1.0, max(0.0, float(embedded[a] @ embedded[b]))) for a, b in pairs]

    def _embed(self, texts: list[str]) -> Any:
        """Return one unit vector for each text."""
        import torch

        model, tokenizer, context = _load(self.model, self.device)
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=context, return_tensors="pt")
        inputs = inputs.to(model.device)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state.float()
        weights = inputs["attention_mask"][..., None].float()
        means = (states * weights).sum(1) / weights.sum(1).clamp_min(1)
        if not bool(means.isfinite().all()):
            raise NonFiniteError(f"the encoder {self.model} gives NaN or infinite states; load it in float32")
        return torch.nn.functional.normalize(means, dim=-1).cpu()


def parse_encoder(setting: str) -> SameSentence:
    """Parse ``FOLDER`` or ``FOLDER:THRESHOLD``.

    Raises:
        ConfigError: If the threshold is out of range.

    Example:
        >>> parse_encoder("models/encoder:0.8").threshold
        0.8
        >>> parse_encoder("models/encoder").model
        'models/encoder'
    """
    folder, _, number = setting.rpartition(":")
    try:
        threshold = float(number)
    except ValueError:
        folder = ""
    return SameSentence(folder, threshold) if folder else SameSentence(setting)


@cache
def _load(name: str, device: str | None) -> tuple[Any, Any, int]:
    import torch

    transformers = require("transformers", "lm")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kinds = [str(kind) for kind in config.architectures or ()]
        if any("CausalLM" in kind or "LMHead" in kind or "ConditionalGeneration" in kind for kind in kinds):
            raise LoadError(f"{name!r} holds a {kinds[0]}, which writes text; take a sentence encoder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(name)
    except LoadError:
        raise
    except Exception as error:  # loading raises many kinds of errors
        text = " ".join(str(error).split())[:160]
        raise LoadError(f"no sentence encoder can be loaded from {name!r} ({type(error).__name__}: {text})") from None
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    context = int(getattr(config, "max_position_embeddings", 512))
    return model.eval().to(place), tokenizer, min(context, tokenizer.model_max_length)
