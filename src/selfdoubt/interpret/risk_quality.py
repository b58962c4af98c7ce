"""Quality of a risk: how well it ranks the predictions of any model, by the metrics of ``selfdoubt.metrics``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from selfdoubt.errors import require
from selfdoubt.interpret.arguments import ArrayLike, read_pair, to_float64


@dataclass(frozen=True)
class RiskQuality:
    """Numbers that say how well a risk ranks predictions by their loss."""

    n: int  #: number of predictions
    mean_loss: float  #: of all predictions; the error rate, where losses are 0 and 1
    loss_at_80: float  #: mean loss of the 80 % with the lowest risks
    aurc: float  #: mean over k of the mean loss of the k surest (``metrics.loss_aurc``), in the unit of the loss
    prr: float  #: 1 for the best order, 0 for a random one, negative for a worse one (``metrics.loss_prr``)
    auroc: float | None  #: chance that a wrong one has the higher risk; None where losses are not 0 and 1

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def measure_risk(risk: ArrayLike, loss: ArrayLike) -> RiskQuality:
    """Return how well a risk ranks predictions: the mean loss if the riskiest are left out, and areas under it.

    It needs numpy, which ``pip install selfdoubt`` does not bring. For curves and other metrics see
    ``selfdoubt.metrics``, which take numpy arrays.

    Args:
        risk: Risks of any shape, which grow with doubt; only their order counts.
        loss: Losses of the same shape: booleans, True for a wrong prediction, or any errors, e.g. squared ones.

    Raises:
        ShapeError: If the shapes differ, or there are no numbers.
        NonFiniteError: If a number is NaN or infinite.
        MetricError: If there are fewer than two predictions, or all losses are equal.
        MissingExtraError: If numpy is not installed.

    Example:
        >>> wrong = torch.tensor([False, False, True, False, True])
        >>> quality = measure_risk([0.1, 0.2, 0.9, 0.3, 0.4], wrong)
        >>> quality.mean_loss, quality.loss_at_80, quality.prr, quality.auroc
        (0.4, 0.25, 1.0, 1.0)
    """
    require("numpy", "qa")
    from selfdoubt import metrics

    scores, losses = (to_float64(x).cpu().flatten() for x in read_pair(risk, loss, ("risk", "loss")))
    is_binary = bool(((losses == 0) | (losses == 1)).all())
    order, errors = scores.numpy(), losses.numpy()
    prr = metrics.loss_prr(order, errors)
    curve = metrics.loss_coverage(order, errors)
    return RiskQuality(
        n=len(errors),
        mean_loss=float(curve.loss[-1]),
        loss_at_80=float(curve.loss[math.ceil(0.8 * len(errors) - 1e-9) - 1]),
        aurc=metrics.loss_aurc(order, errors),
        prr=prr,
        auroc=metrics.auroc(order, errors == 0) if is_binary else None,
    )
