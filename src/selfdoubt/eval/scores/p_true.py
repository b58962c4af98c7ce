"""P(True): the model is asked whether its own answer is true (after Kadavath et al., 2022, "Language models (mostly)
know what they know"); the share of "true" against "false" among the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from selfdoubt import risk
from selfdoubt.errors import ConfigError
from selfdoubt.eval.records import Question
from selfdoubt.lm.prefill import prefill, skip_scores
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.text.encoder import get_encoder
from selfdoubt.lm.text.prompt import encode

if TYPE_CHECKING:
    from selfdoubt.eval.config import EvaluationConfig
    from selfdoubt.lm.model import RiskAwareLM

_TEXT = """\
{context}Question: {question}
Proposed answer: {answer}
Is the proposed answer true or false? Say only True or False."""
#: Forms of the two words: capitalised or in lower case, with or without a space before.
_FORMS = {"true": ("True", " True", "true", " true"), "false": ("False", " False", "false", " false")}


def estimate_p_true(lm: RiskAwareLM, pairs: Sequence[tuple[Question, str]], config: EvaluationConfig) -> list[float]:
    """Return the probability of "true" against "false", in [0, 1], for each question with its answer.

    Raises:
        ConfigError: If "true" and "false" share all first tokens in this vocabulary.
    """
    end = "\nVerdict:" if config.raw else ""
    prompts = [encode(lm.tokenizer, _prompt(q, a) + end, raw=config.raw).ids for q, a in pairs]
    true, false = (_first_ids(lm.tokenizer, forms) for forms in _FORMS.values())
    both = true & false  # such as a token of one space
    if not true - both or not false - both:
        raise ConfigError("no first token of this vocabulary separates true from false; ask without --p-true")
    shares: list[float] = []
    for first in range(0, len(prompts), config.batch_size):
        batch = prompts[first : first + config.batch_size]
        _, following = prefill(HFStepper(lm.model), batch, scored=skip_scores(batch))
        risk.total(following.logits)  # an error where they are NaN or infinite
        logp = following.mixture.double().log_softmax(-1)
        mass = [logp[:, sorted(ids - both)].logsumexp(-1) for ids in (true, false)]
        shares += torch.stack(mass, -1).softmax(-1)[:, 0].tolist()
    return shares


def _prompt(question: Question, answer: str) -> str:
    context = f"{question.context}\n\n" if question.context else ""
    return _TEXT.format(context=context, question=question.text, answer=answer or "(none)")


def _first_ids(tokenizer: Any, forms: Sequence[str]) -> set[int]:
    return {get_encoder(tokenizer).encode(form).ids[0] for form in forms}
