"""Class probabilities where the logits have normal noise, as a sculpt of a classifier's head predicts it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from selfdoubt.errors import ConfigError
from selfdoubt.forecast import Forecast
from selfdoubt.interpret.arguments import ArrayLike, read_with_std, to_float64
from selfdoubt.interpret.probabilities import check_classes, read_logits

NoiseMethod = Literal["exact", "mean_field"]

#: Step of the trapezoid sums, in standard deviations and in logits, and the bounds beyond which nothing is left: of a
#: normal variable, and of a logistic or Gumbel one. Their error is exp(-2 pi d / step), where d is the distance of the
#: integrand's nearest singularity from the real axis: pi for a logistic, pi / 2 for a Gumbel.
_STEP, _NORMAL, _TAIL = 0.5, 9.0, 40.0
#: The same for many classes, where it takes time: to 1e-6.
_FAST_STEP, _FAST_NORMAL, _FAST_TAIL = 0.6, 6.0, 18.0
#: Numbers in memory at a time.
_BLOCK = 1 << 22


def class_probabilities(forecast: Forecast, *, method: NoiseMethod = "exact") -> Float[Tensor, "batch *rest classes"]:
    """Return the class probabilities that a forecast of logits answers with: the softmax of its ``mean``.

    That is the mean of the members' probabilities or, where the base model answers, the base's. With a sculpt inside
    each is averaged over its noise first (``average_noise``), as if that were normal.

    Args:
        forecast: A forecast with ``kind="logits"``, as wrappers with ``output="logits"`` give it.
        method: As for ``average_noise``; it counts only with a sculpt inside.

    Raises:
        ConfigError: If it is not a forecast, or one of values, or if the method is another one.
        ShapeError: If there are fewer than two classes.
        NonFiniteError: If a logit is NaN or infinite.

    Example:
        >>> members = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])
        >>> class_probabilities(Forecast(members, kind="logits")).tolist()
        [[0.5, 0.5]]
    """
    if not isinstance(forecast, Forecast):
        raise ConfigError(
            f"class probabilities need a forecast, got {type(forecast).__name__}; give wrapped.forecast(x), "
            "average_members(logits) for (members, batch, classes), or logits.softmax(-1) for one model"
        )
    if forecast.kind != "logits":
        raise ConfigError(
            'class probabilities need a forecast of logits, got one of values; wrap with output="logits", '
            "e.g. vote.Wrapper(n_voters=5, output='logits')"
        )
    if forecast.scale_std is None:
        return read_logits(forecast.mean).softmax(-1)
    answers = forecast.members if forecast.base is None else forecast.base[None]
    return average_noise(answers, forecast.scale_std, method=method).mean(0)


def average_binary_noise(logit: ArrayLike, std: ArrayLike) -> Float[Tensor, "*batch"]:
    """Return the mean of ``sigmoid`` over normal noise on a logit: E[sigmoid(logit + std z)], z ~ N(0, 1), in [0, 1].

    By trapezoid sums, exact to rounding (Trefethen & Weideman, 2014, "The exponentially convergent trapezoidal rule"):
    over z for std < 1 and, from E = P(L <= logit + std z) with a logistic L, over L for larger ones. MacKay's
    approximation, sigmoid(logit / sqrt(1 + pi std^2 / 8)), is up to 0.02 away.

    Args:
        logit: Log odds of class 1, of any shape.
        std: Standard deviation of its noise, of the same shape, at least 0; the risk of a ``sculpt``.

    Raises:
        ShapeError: If the shapes differ, or there are no numbers.
        NonFiniteError: If a number is NaN or infinite.
        DataError: If a standard deviation is negative.

    Example:
        >>> p = average_binary_noise([2.0, 2.0, -2.0], [0.0, 3.0, 3.0])
        >>> [round(x, 4) for x in p.tolist()]
        [0.8808, 0.7174, 0.2826]
    """
    return _average_sigmoid(*read_with_std(logit, std))


def average_noise(
    logits: ArrayLike, std: ArrayLike, *, method: NoiseMethod = "exact"
) -> Float[Tensor, "*batch classes"]:
    """Return the mean of ``softmax`` over independent normal noise on the logits: E[softmax(logits + std z)].

    "exact": with Gumbel noise G, softmax(x)_k is the chance that x_k + G_k is the largest (Gumbel, 1954; Maddison et
    al., 2014, "A* sampling"), so p_k is the chance that X_k = logits_k + std_k z_k + G_k is, and the X are independent:

        p_k = integral f_k(x) prod_(i != k) F_i(x) dx

    by trapezoid sums in float64, to 1e-6; two classes by ``average_binary_noise`` of their difference. It takes the
    time of 1,000 to 10,000 softmaxes, the more the larger the stds. "mean_field" takes that of one per class and is up
    to 0.2 away for many classes and stds above 1: Lu, Ie and Sha (2020, "Mean-field approximation to Gaussian-softmax
    integral"), divided by its sum:

        p_k ~ 1 / sum_i exp((logits_i - logits_k) / sqrt(1 + pi (std_i^2 + std_k^2) / 8))

    Args:
        logits: Unnormalised scores, ``(*batch, classes)``.
        std: Standard deviations of their noise, of the same shape, at least 0: the risk of a ``sculpt`` of ``Normal``.
        method: "exact", or "mean_field" for maps of many pixels.

    Raises:
        ConfigError: If the method is another one.
        ShapeError: If the shapes differ, or there are fewer than two classes.
        NonFiniteError: If a number is NaN or infinite.
        DataError: If a standard deviation is negative.

    Example:
        >>> p = average_noise([[2.0, 0.0, 0.0]], [[3.0, 3.0, 3.0]])
        >>> [round(x, 3) for x in p[0].tolist()]
        [0.517, 0.242, 0.242]
    """
    if method not in ("exact", "mean_field"):
        raise ConfigError(f'method must be "exact" or "mean_field", got {method!r}')
    y, spread = read_with_std(logits, std)
    check_classes(y)
    if y.shape[-1] == 2:
        p = _average_sigmoid(y[..., 1] - y[..., 0], spread.square().sum(-1).sqrt())
        return torch.stack([1 - p, p], -1)
    rows, spreads = y.flatten(0, -2) if y.ndim > 1 else y[None], spread.reshape(-1, y.shape[-1])
    average = _integrate_rows if method == "exact" else _approximate_rows
    size = max(1, _BLOCK // (y.shape[-1] * 40))
    starts = range(0, len(rows), size)
    return torch.cat([average(rows[i : i + size], spreads[i : i + size]) for i in starts]).reshape(y.shape)


def _approximate_rows(
    y: Float[Tensor, "rows classes"], std: Float[Tensor, "rows classes"]
) -> Float[Tensor, "rows classes"]:
    """Return the mean-field approximation, one class after the other."""
    scores = []
    for k in range(y.shape[-1]):
        variance = std[:, k, None].square() + std.square()
        scores.append(-((y - y[:, k, None]) / (1 + math.pi / 8 * variance).sqrt()).logsumexp(-1))
    return torch.stack(scores, -1).softmax(-1)


def _integrate_rows(
    y: Float[Tensor, "rows classes"], std: Float[Tensor, "rows classes"]
) -> Float[Tensor, "rows classes"]:
    """Return p_k = sum_x f_k(x) prod_(i != k) F_i(x) step."""
    means, spreads = to_float64(y), to_float64(std)
    low = (means - _FAST_NORMAL * spreads).amax(-1, keepdim=True) - 3.5  # the largest X lies above
    high = (means + _FAST_NORMAL * spreads).amax(-1, keepdim=True) + _FAST_TAIL
    nodes = math.ceil(float((high - low).max()) / _FAST_STEP)
    is_wide = spreads >= 1
    narrow, wide = spreads[~is_wide], spreads[is_wide]
    p, density, share = (torch.zeros_like(means) for _ in range(3))
    for i in range(nodes + 1):
        x = low + i * _FAST_STEP - means
        density[~is_wide], share[~is_wide] = _measure_narrow_noise(x[~is_wide], narrow)
        density[is_wide], share[is_wide] = _measure_wide_noise(x[is_wide], wide)
        logs = share.clamp_min(torch.finfo(share.dtype).tiny).log()
        p += density * (logs.sum(-1, keepdim=True) - logs).exp()
    return (p / p.sum(-1, keepdim=True)).to(y)


def _measure_narrow_noise(x: Float[Tensor, " n"], std: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Return the density and the distribution function of std z + G at x, normal z and Gumbel G: a sum over z."""
    z = torch.arange(-_FAST_NORMAL, _FAST_NORMAL + _FAST_STEP, _FAST_STEP, dtype=x.dtype, device=x.device)[:, None]
    weight = _FAST_STEP / math.sqrt(2 * math.pi) * (-z.square() / 2).exp()
    fall = (std * z - x).clamp_max(700).exp()  # G <= x - std z has the chance exp(-fall)
    share = weight * (-fall).exp()
    return (share * fall).sum(0), share.sum(0)


def _measure_wide_noise(x: Float[Tensor, " n"], std: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Return the same by a sum over G, which has the finer structure if std >= 1."""
    g = torch.arange(-3.5, _FAST_TAIL, _FAST_STEP, dtype=x.dtype, device=x.device)[:, None]
    weight = _FAST_STEP * (-g - (-g).exp()).exp()
    apart = (x - g) / std
    densities = (-apart.square() / 2).exp() / (std * math.sqrt(2 * math.pi))
    return (weight * densities).sum(0), (weight * torch.special.ndtr(apart)).sum(0)


def _average_sigmoid(logit: Tensor, std: Tensor) -> Tensor:
    """Return E[sigmoid(logit + std z)], summed for the less probable class so that small probabilities are kept."""
    low = -logit.abs()
    is_wide = std >= 1
    narrow, wide = torch.where(is_wide, 0, std), torch.where(is_wide, std, 1)
    small = torch.zeros_like(low)
    for i in range(-18, 19):
        z = i * _STEP
        weight = _STEP * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        small += weight * (low + narrow * z).sigmoid()
    if is_wide.any():
        other = torch.zeros_like(low)
        for i in range(-80, 81):
            x = i * _STEP
            weight = _STEP * math.exp(-abs(x)) / (1 + math.exp(-abs(x))) ** 2
            other += weight * torch.special.ndtr((low - x) / wide)
        small = torch.where(is_wide, other, small)
    return torch.where(logit > 0, 1 - small, small).clamp(0, 1)
