"""All errors and warnings, as one tree. Every message says what was expected, what was found, and the repair.

SelfdoubtError
├── ConfigError          a setting outside its range
├── TargetError          a parameter filter that hits nothing
├── WrapError            a model that this wrapper cannot wrap
├── CaptureError         a model that cannot be compiled as one graph
├── ShapeError           rows, members or classes that do not fit
├── NonFiniteError       NaN or infinity where a risk is computed
├── PromptError          an empty or over-long prompt
├── DataError            a data file that cannot be read, or a broken record in it
├── MetricError          answers on which a metric is not defined
├── LoadError            a model or adapter that cannot be read
│   └── BaseMismatchError    an adapter made for another base model
├── UploadError          a folder that the hub does not take
├── ServingError         a request that the engine does not answer
│   ├── BusyError            too many are waiting already
│   ├── DeadlineError        its time is over
│   └── EngineError          the engine has failed or is closing
└── MissingExtraError    an optional dependency that is not installed
"""

from __future__ import annotations

from types import ModuleType


class SelfdoubtError(Exception):
    """The root of all errors this library raises on purpose."""


class ConfigError(SelfdoubtError, ValueError):
    """A setting is outside its range."""


class TargetError(SelfdoubtError, ValueError):
    """A parameter filter hits nothing."""


class WrapError(SelfdoubtError, TypeError):
    """This wrapper cannot wrap this model."""


class CaptureError(SelfdoubtError, RuntimeError):
    """The model cannot be compiled as one graph."""


class ShapeError(SelfdoubtError, ValueError):
    """Rows, members or classes do not fit."""


class NonFiniteError(SelfdoubtError, ArithmeticError):
    """NaN or infinity where a risk was asked for: it never becomes one."""


class PromptError(SelfdoubtError, ValueError):
    """A prompt is empty or too long."""


class DataError(SelfdoubtError, ValueError):
    """A data file cannot be read, or a record in it is broken."""


class MetricError(SelfdoubtError, ValueError):
    """A metric is not defined on these answers: it never becomes a number."""


class LoadError(SelfdoubtError, OSError):
    """A model or an adapter cannot be read."""


class BaseMismatchError(LoadError):
    """An adapter was made for another base model."""


class UploadError(SelfdoubtError, OSError):
    """The hub does not take a folder, or cannot be reached."""


class ServingError(SelfdoubtError, RuntimeError):
    """The engine does not answer a request."""


class BusyError(ServingError):
    """Too many requests are waiting already; ``retry_after`` is a guess in seconds of when there is room again."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServingError):
    """The time that a request was given is over."""


class EngineError(ServingError):
    """The engine has failed or is closing."""


class MissingExtraError(SelfdoubtError, ImportError):
    """An optional dependency is not installed."""


class UntrainedWarning(UserWarning):
    """Members that nothing has trained answer together with the model: its answers change, mostly for the worse."""


class SlowWarning(UserWarning):
    """Something runs in a way that is right, and slower than it could be."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one line how to install it.

    Raises:
        MissingExtraError: If the module is not installed.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this needs the package {error.name!r}, which is not installed; "
            f'install it with: pip install "selfdoubt[{extra}]"'
        ) from None
