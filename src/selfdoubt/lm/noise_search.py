"""Searches the largest size of noise at which voters or samples keep a language model's own greedy answers.

The base model answers questions; then members read its answers, teacher-forced, beside a base row. A size passes if at
most 1 % of their most probable tokens differ from the base's, and KL(base || member) is at most 0.01 nats per token,
beyond what rounding alone does in the model's dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.front import LMFront, ModelWithFront
from selfdoubt.lm.generation import generate_answers
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.step_modes import StepMode
from selfdoubt.lm.text.prompt import encode
from selfdoubt.members import Wrapped, count_rows
from selfdoubt.noise import SMALLEST, STEPS, NoiseLimits, NoiseSearch, NoiseTally, NoiseTrial, find_noisy, search_size
from selfdoubt.noise_fit import add_base_row, run_base, scale_open_noise
from selfdoubt.rows import expand, unfold
from selfdoubt.wrapping import innermost

#: Most tokens of an answer that is compared.
_MAX_TOKENS = 24
#: Texts on which the outputs of leaves are measured.
_MEASURED = 16
#: Logits of one pass are at most this many numbers (128 MiB in float32).
_PIECE = 2**25
#: Questions for a model that is loaded with ``weight_noise="auto"`` and has no others.
QUESTIONS = (
    "What is the capital of France?",
    "Who wrote the play Romeo and Juliet?",
    "How many legs does a spider have?",
    "Why is the sky blue?",
    "Name three fruits that are red.",
    "What does a carpenter do?",
    "Translate into Spanish: Good morning, my friend.",
    "What is 12 times 7?",
    "In which year did the Second World War end?",
    "Explain in one sentence how a bicycle stays upright.",
    "What is the boiling point of water in degrees Celsius?",
    "Which planet is the largest in our solar system?",
    "Write a short sentence about the sea.",
    "Give me a synonym for happy.",
    "Who painted the Mona Lisa?",
    "What language do people speak in Brazil?",
    "What should I do if I cut my finger?",
    "List the days of the week.",
    "What is photosynthesis?",
    "How do you say thank you in German?",
    "Which metal is liquid at room temperature?",
    "What is the opposite of cold?",
    "What is a good name for a black cat?",
    "Where do penguins live?",
    "What is the tallest mountain in the world?",
    "Complete the sentence: The early bird catches the",
    "How does a refrigerator keep food cold?",
    "What is the square root of 81?",
    "Who was the first person to walk on the Moon?",
    "What are the ingredients of bread?",
    "Is a tomato a fruit or a vegetable?",
    "What time zone is London in?",
)


@dataclass(frozen=True)
class _Text:
    """An answer behind its prompt, of which the last token predicts as the ones before it."""

    ids: list[int]
    predictions: int  #: number of last tokens whose predictions are compared


@dataclass(eq=False)
class _BaseModel:
    """The base model, while its replaced leaves run without noise, with the front of the whole."""

    model: nn.Module
    front: LMFront
    step: StepMode = "eager"


def search_noise(
    lm: ModelWithFront,
    questions: Sequence[PromptLike] = QUESTIONS,
    *,
    answers: Sequence[Answer] | None = None,
    limits: NoiseLimits | None = None,
    max_tokens: int = _MAX_TOKENS,
    low: float = SMALLEST,
    high: float | None = None,
    steps: int = STEPS,
    progress: Callable[[NoiseTrial], None] | None = None,
) -> NoiseSearch:
    """Set the noise of a model's untrained members to the largest size that keeps its answers, in place.

    Deviations of ``weight_noise="auto"`` are first scaled to the outputs of their leaves on these questions. The
    settings of the wrapper (``lm.model.spec``) then hold the size: saving and loading keep it.

    Args:
        lm: A model with voters or samples that nothing has trained yet.
        questions: Questions or chats; 32 to 64 are enough.
        answers: The base model's own greedy answers to them, if they are there; None lets it answer now.
        limits: Limits of the change; None takes 1 % of flips and a KL of 0.01 nats.
        max_tokens: Most tokens of an answer that are compared.
        low: Smallest size.
        high: Largest size; None takes the wrapper's ``largest_noise``.
        steps: Steps of the bisection.
        progress: Function that is called after each trial, of which there are about ``steps + 2``.

    Raises:
        ConfigError: If there are no questions, or even the smallest size changes too many answers.
        WrapError: If the model has neither voters nor samples.
    """
    model = lm.model
    noisy, limits = find_noisy(model), limits or NoiseLimits()
    assert isinstance(model, Wrapped)
    if not questions:
        raise ConfigError("the size of noise is searched on a model's own answers, got no questions; give about 32")
    if answers is None:
        with run_base(model) as base:
            options: Any = {"max_tokens": max_tokens}
            answers = generate_answers(_BaseModel(base, lm.front), questions, 8, [0] * len(questions), options)
    prompts = [encode(lm.front.tokenizer, question).ids for question in questions]
    texts = [_join(prompt, answer, max_tokens) for prompt, answer in zip(prompts, answers, strict=True)]
    texts.sort(key=lambda text: len(text.ids))

    def run(base: nn.Module) -> None:
        for text in texts[:: max(1, len(texts) // _MEASURED)]:
            _read(base, [text], 1)

    scale_open_noise(model, run)

    @torch.inference_mode()
    def measure(most: NoiseLimits) -> NoiseTally:
        with add_base_row(noisy):
            return _compare(model, texts, most)

    return search_size(model, measure, limits, low=low, high=high, steps=steps, progress=progress)


def _join(prompt: list[int], answer: Answer, max_tokens: int) -> _Text:
    """Return the tokens whose predictions are compared: those of the answer, and that of its end."""
    ids = [token.id for token in answer.tokens]
    predictions = min(len(ids) + (answer.finish == "stop"), max_tokens)
    return _Text((prompt + ids)[: len(prompt) - 1 + predictions], predictions)


def _compare(model: Wrapped, texts: Sequence[_Text], limits: NoiseLimits) -> NoiseTally:
    """Compare members with the base on all texts; give up where they exceed the limits whatever follows."""
    members = count_rows(model)
    total = (members - 1) * sum(text.predictions for text in texts)
    longest = max(text.predictions for text in texts)
    vocabulary = innermost(model).config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    batch = max(1, _PIECE // (members * longest * vocabulary))
    tally = NoiseTally()
    for first in range(0, len(texts), batch):
        piece = texts[first : first + batch]
        columns = max(text.predictions for text in piece)
        logits = unfold(_read(model, piece, columns), members)
        ends = torch.tensor([text.predictions for text in piece], device=logits.device)
        chosen = torch.arange(columns, device=logits.device) >= columns - ends[:, None]
        tally.add_logits(logits[0][chosen], logits[1:, chosen])
        if tally.exceeds(limits, total):
            break
    return tally


@torch.no_grad()
def _read(model: nn.Module, texts: Sequence[_Text], columns: int) -> Tensor:
    """Return the logits at the last columns of texts, ``(rows, columns, classes)``; rows are member-major."""
    inner = innermost(model)
    device = next(inner.parameters()).device
    members = count_rows(model)
    width = max(len(text.ids) for text in texts)
    padded = torch.tensor([[0] * (width - len(text.ids)) + text.ids for text in texts], device=device)
    inputs: dict[str, Any] = {"input_ids": expand(padded, members), "use_cache": False}
    accepted = inspect.signature(inner.forward).parameters
    lengths = torch.tensor([len(text.ids) for text in texts], device=device)
    if int(lengths.min()) < width:
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        inputs["attention_mask"] = expand(mask, members)
        if "position_ids" in accepted:
            inputs["position_ids"] = expand((mask.cumsum(1) - 1).clamp_min(0), members)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = columns
    if isinstance(model, Wrapped) and getattr(model.spec, "start", "prompt") == "answer":
        predictions = torch.tensor([text.predictions for text in texts], device=device)
        active = torch.arange(width, device=device) >= width - predictions[:, None]
        inputs["active"] = expand(active, members)
    output = model.forward_rows(**inputs)[0] if isinstance(model, Wrapped) else model(**inputs)
    logits: Tensor = output.logits
    return logits[:, -columns:]
