"""Language models: load them, generate with a risk for every token, score existing text.

``text`` turns messages into token ids and back, ``adapters`` saves and loads the parameters added to a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

if TYPE_CHECKING:
    from selfdoubt.lm.answer import Alternative, Answer, Token
    from selfdoubt.lm.calibration import Calibration
    from selfdoubt.lm.conditions import Conditions
    from selfdoubt.lm.confidence import choose_best
    from selfdoubt.lm.front import LMFront
    from selfdoubt.lm.generation import Stream
    from selfdoubt.lm.hidden_states import AnswerStates, StateKey
    from selfdoubt.lm.load import load_model
    from selfdoubt.lm.model import RiskAwareLM
    from selfdoubt.lm.options import Options
    from selfdoubt.lm.scores import Score, reference_quantiles
    from selfdoubt.lm.until import Attempts

_HOMES = {
    "Alternative": "answer",
    "Answer": "answer",
    "AnswerStates": "hidden_states",
    "Attempts": "until",
    "Calibration": "calibration",
    "Conditions": "conditions",
    "LMFront": "front",
    "Options": "options",
    "RiskAwareLM": "model",
    "Score": "scores",
    "StateKey": "hidden_states",
    "Stream": "generation",
    "Token": "answer",
    "choose_best": "confidence",
    "load_model": "load",
    "reference_quantiles": "scores",
}

__all__ = [
    "Alternative",
    "Answer",
    "AnswerStates",
    "Attempts",
    "Calibration",
    "Conditions",
    "LMFront",
    "Options",
    "RiskAwareLM",
    "Score",
    "StateKey",
    "Stream",
    "Token",
    "choose_best",
    "load_model",
    "reference_quantiles",
]

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
