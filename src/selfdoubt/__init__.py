"""selfdoubt makes any PyTorch model, LLMs first, know what it doesn't know.

Wrap a model, call it as before, and ask for the risk next to the answer::

    from selfdoubt import vote
    wrapped = vote.Wrapper(n_voters=3)(model)
    y, risk = wrapped(x, return_risk=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfdoubt.errors import require
from selfdoubt.version import __version__

if TYPE_CHECKING:
    from selfdoubt import density, errors, interpret, metrics, risk, sample, sculpt, vote
    from selfdoubt.errors import SelfdoubtError
    from selfdoubt.forecast import Forecast, Prediction
    from selfdoubt.lm.answer import Answer, Token
    from selfdoubt.lm.model import RiskAwareLM
    from selfdoubt.members import Wrapped
    from selfdoubt.preparation.run import prepare
    from selfdoubt.storage import load, save
    from selfdoubt.workflow import calibrate, evaluate

__all__ = [
    "Answer",
    "Forecast",
    "Prediction",
    "RiskAwareLM",
    "SelfdoubtError",
    "Token",
    "Wrapped",
    "__version__",
    "calibrate",
    "density",
    "errors",
    "evaluate",
    "interpret",
    "load",
    "metrics",
    "prepare",
    "risk",
    "sample",
    "save",
    "sculpt",
    "vote",
]

_HOMES = {
    "Answer": "selfdoubt.lm.answer",
    "Forecast": "selfdoubt.forecast",
    "Prediction": "selfdoubt.forecast",
    "RiskAwareLM": "selfdoubt.lm.model",
    "SelfdoubtError": "selfdoubt.errors",
    "Token": "selfdoubt.lm.answer",
    "Wrapped": "selfdoubt.members",
    "calibrate": "selfdoubt.workflow",
    "evaluate": "selfdoubt.workflow",
    "load": "selfdoubt.storage",
    "prepare": "selfdoubt.preparation.run",
    "save": "selfdoubt.storage",
}


#: The extra whose packages a name needs, where torch, safetensors and jaxtyping are not all.
_EXTRAS = {"Answer": "lm", "RiskAwareLM": "lm", "Token": "lm", "prepare": "lm"} | dict.fromkeys(
    ("calibrate", "evaluate", "metrics"), "qa"
)


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can print its help without importing torch.
    if name in _HOMES:
        return getattr(require(_HOMES[name], _EXTRAS.get(name, "all")), name)
    if name in __all__:
        return require(f"selfdoubt.{name}", _EXTRAS.get(name, "all"))
    raise AttributeError(f"module 'selfdoubt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
