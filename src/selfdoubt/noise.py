"""Searches the largest size of noise that leaves a model's predictions as they are.

Members that nothing has trained must stay near the model: deviations of voters and the noise of samples grow, with
their draws fixed, to the largest size at which members still predict as the base model does, by a bisection on the
logarithm of one size for all leaves. ``noise_fit.py`` runs it on any module, ``lm/noise_search.py`` on language models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from selfdoubt.distributions import wide_dtype
from selfdoubt.errors import ConfigError, NonFiniteError, WrapError
from selfdoubt.members import Wrapped

#: Smallest size that is tried, and the steps of the bisection: the result is within 5 % of the largest.
SMALLEST, STEPS = 1e-5, 4


@dataclass(frozen=True)
class NoiseLimits:
    """The largest change of predictions that noise may make.

    Raises:
        ConfigError: If one is not above 0.
    """

    flip_rate: float = 0.01  #: share of predictions whose most probable class changes, over members
    divergence: float = 0.01  #: mean KL(base || member), nats
    change: float = 0.01  #: of values: root mean square of members' distances from the base, relative to the base's own

    def __post_init__(self) -> None:
        for name in ("flip_rate", "divergence", "change"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}; try {name}=0.01")


#: Largest change by rounding alone, at the smallest size of noise, with which a search can begin.
MOST_ROUNDING = NoiseLimits(0.05, 0.05, 0.05)


@dataclass(frozen=True)
class NoiseTrial:
    """One size that was tried. A size that failed may have been given up before all predictions were made."""

    alpha: float
    flip_rate: float
    divergence: float
    change: float
    passed: bool


@dataclass(frozen=True)
class NoiseSearch:
    """The largest size of noise that keeps a model's predictions, and how far it moves them."""

    alpha: float  #: ``alpha`` of voters; ``std`` or ``p`` of samples
    flip_rate: float  #: share of members' predictions whose most probable class is not the base's, in [0, 1]
    divergence: float  #: mean KL(base || member), nats
    tried: tuple[NoiseTrial, ...]  #: in the order of the search; the first is the smallest size, which shows rounding
    change: float = 0.0  #: of values: root mean square distance from the base, relative to the base's own


@runtime_checkable
class NoisySpec(Protocol):
    """The interface of wrappers whose noise has one size: vote and sample."""

    @property
    def start_noise(self) -> float:
        """The first size that a search tries."""

    @property
    def largest_noise(self) -> float:
        """The largest size that a search tries."""

    @property
    def seeks_noise(self) -> bool:
        """True if the size of the noise is still to be searched."""

    def with_noise(self, size: float) -> Any:
        """Return the settings with noise of this size."""


@runtime_checkable
class NoisyModule(Protocol):
    """The interface of replaced leaves whose noise has a size."""

    def set_noise(self, size: float) -> None:
        """Set the size of the noise."""


@dataclass
class NoiseTally:
    """Sums over predictions of how far members are from the base."""

    count: int = 0  #: predictions of classes, times members
    flips: float = 0.0
    divergence: float = 0.0
    squares: float = 0.0  #: of values: mean over members of their squared distances from the base
    own_squares: float = 0.0  #: of values: the base's own squares

    def add_logits(self, base: Float[Tensor, "*batch classes"], members: Float[Tensor, "m *batch classes"]) -> None:
        """Add predictions of classes.

        Raises:
            NonFiniteError: If a logit is NaN or infinite.
        """
        wide = wide_dtype(base)
        base_logp, member_logp = base.to(wide).log_softmax(-1), members.to(wide).log_softmax(-1)
        divergence = (base_logp.exp() * (base_logp - member_logp)).sum(-1).clamp_min(0)
        self.count += divergence.numel()
        self.flips += float((members.argmax(-1) != base.argmax(-1)).double().sum())
        self.divergence += check_finite_sum(float(divergence.double().sum()))

    def add_values(self, base: Float[Tensor, "*batch"], members: Float[Tensor, "m *batch"]) -> None:
        """Add predictions of values.

        Raises:
            NonFiniteError: If a value is NaN or infinite.
        """
        distance = members.double() - base.double()
        self.squares += check_finite_sum(float(distance.square().sum()) / len(members))
        self.own_squares += float(base.double().square().sum())

    def widen(self, limits: NoiseLimits) -> NoiseLimits:
        """Return limits that allow this change, by rounding alone, as well as the limits'."""
        count = max(self.count, 1)
        return NoiseLimits(
            limits.flip_rate + self.flips / count,
            limits.divergence + self.divergence / count,
            limits.change + self.change,
        )

    @property
    def change(self) -> float:
        """Root mean square distance of the members' values from the base's, relative to these."""
        if self.squares == 0:
            return 0.0
        return math.sqrt(self.squares / self.own_squares) if self.own_squares else math.inf

    def exceeds(self, limits: NoiseLimits, total: int | None = None) -> bool:
        """Return whether a limit is exceeded; ``total`` is the number of predictions in the end, if that is known."""
        count = max(total or self.count, 1)
        return (
            self.flips > limits.flip_rate * count
            or self.divergence > limits.divergence * count
            or self.change > limits.change
        )

    def judge(self, alpha: float, limits: NoiseLimits) -> NoiseTrial:
        """Return the result of a trial of this size."""
        count = max(self.count, 1)
        passed = not self.exceeds(limits)
        return NoiseTrial(alpha, self.flips / count, self.divergence / count, self.change, passed)


def search_largest(
    check: Callable[[float], bool], low: float, high: float, *, start: float, steps: int = STEPS
) -> float | None:
    """Return the largest value that was checked and passed; None if none down to ``low`` passed.

    From ``start`` the value doubles until one fails, or halves until one passes; then a bisection on the logarithm goes
    on between the two. The result always passed its check, also where the check is not monotone.

    Args:
        check: A check that small values pass.
        low: Smallest value, above 0.
        high: Largest value.
        start: First value.
        steps: Halvings of the last range: the first failing value is larger than the result by a factor of at most
            ``2 ** (2 ** -steps)``, if values up to ``high`` fail.

    Raises:
        ConfigError: If the range is empty or does not hold ``start``, or ``steps`` is negative.

    Example:
        >>> largest = search_largest(lambda x: x <= 0.3, 0.01, 1.0, start=0.1, steps=12)
        >>> 0.2999 < largest <= 0.3
        True
    """
    if not 0 < low <= start <= high < math.inf or steps < 0:
        raise ConfigError(
            f"a search needs 0 < low <= start <= high and steps >= 0, got {low}, {start}, {high} and {steps}"
        )
    value, up = start, check(start)
    while True:
        following = min(2 * value, high) if up else max(value / 2, low)
        if following == value:  # at the end of the range
            return value if up else None
        before, value = value, following
        if check(value) is not up:
            break
    passing, failing = (before, value) if up else (value, before)
    for _ in range(steps):
        middle = math.sqrt(passing * failing)
        if check(middle):
            passing = middle
        else:
            failing = middle
    return passing


def find_noisy(model: nn.Module) -> Wrapped:
    """Return the wrapper of a model whose noise has a size.

    Raises:
        WrapError: If there is none.
    """
    inside = model
    while isinstance(inside, Wrapped):
        if isinstance(inside.spec, NoisySpec):
            return inside
        inside = inside.module
    raise WrapError("only voters and samples have noise whose size can be searched; wrap with vote or sample")


def set_noise(wrapped: Wrapped, size: float) -> None:
    """Set the size of the noise in all leaves and in the settings: ``alpha`` of voters, ``std`` or ``p`` of samples.

    Raises:
        WrapError: If the wrapper's noise has no size.
    """
    noisy = find_noisy(wrapped)
    assert isinstance(noisy.spec, NoisySpec)
    for module in noisy.modules():
        if isinstance(module, NoisyModule):
            module.set_noise(size)
    noisy.spec = noisy.spec.with_noise(size)


def search_size(
    wrapped: nn.Module,
    measure: Callable[[NoiseLimits], NoiseTally],
    limits: NoiseLimits,
    *,
    low: float = SMALLEST,
    high: float | None = None,
    steps: int = STEPS,
    progress: Callable[[NoiseTrial], None] | None = None,
) -> NoiseSearch:
    """Set the noise to the largest size at which members keep the base's predictions, and return it.

    In a narrow dtype any noise at all, however small, is rounded otherwise and turns near ties: 1.8 % of SmolLM2's most
    probable tokens in bfloat16. The limits hold for what comes on top of that, which is measured at the smallest size.

    Args:
        wrapped: A model with voters or samples.
        measure: Function that runs the model and compares its members with its base; it may give up where one of the
            limits that it is given is exceeded.
        limits: Limits of the change, beyond that by rounding.
        low: Smallest size.
        high: Largest size; None takes the wrapper's ``largest_noise``.
        steps: Steps of the bisection.
        progress: Function that is called after each trial.

    Raises:
        ConfigError: If even ``low`` changes more than ``MOST_ROUNDING`` and the limits; the noise is then ``low``.
        WrapError: If the model has neither voters nor samples.
    """
    noisy = find_noisy(wrapped)
    assert isinstance(noisy.spec, NoisySpec)
    high = noisy.spec.largest_noise if high is None else high
    start = min(max(noisy.spec.start_noise, low), high)
    most = NoiseLimits(
        *(max(ours, theirs) for ours, theirs in zip(astuple(MOST_ROUNDING), astuple(limits), strict=True))
    )
    set_noise(noisy, low)
    smallest = measure(most)
    first = smallest.judge(low, most)
    if not first.passed:
        raise ConfigError(
            f"even noise of size {low:g} changes the answers ({first.flip_rate:.1%} flips, KL {first.divergence:.2g} "
            f"nats, change {first.change:.2g}); use a wider dtype, e.g. float32, or other layers with param_filter"
        )
    tried, allowed = [first], smallest.widen(limits)
    if progress is not None:
        progress(first)

    def check(size: float) -> bool:
        if size == low:
            return True
        set_noise(noisy, size)
        tried.append(measure(allowed).judge(size, allowed))
        if progress is not None:
            progress(tried[-1])
        return tried[-1].passed

    largest = search_largest(check, low, high, start=start, steps=steps)
    assert largest is not None  # the smallest passes
    set_noise(noisy, largest)
    best = next(trial for trial in tried if trial.alpha == largest)
    return NoiseSearch(largest, best.flip_rate, best.divergence, tuple(tried), best.change)


def check_finite_sum(value: float) -> float:
    """Return a sum over a model's outputs.

    Raises:
        NonFiniteError: If it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise NonFiniteError(
            "an output of the model is NaN or infinite, so that noise cannot be measured; check the model's weights, "
            "its inputs and its dtype"
        )
    return value
