"""The decision of least expected cost, or none where every one of them would cost more than to reject."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfdoubt.errors import ConfigError, ShapeError
from selfdoubt.interpret.arguments import ArrayLike, read_numbers, read_probabilities, read_scalar

#: The choice that stands for none: ask a person, run another test.
REJECT = -1


class Decision(NamedTuple):
    """Choices and their expected costs."""

    choice: Int[Tensor, "*batch"]  #: index of a column of the costs, or ``REJECT``
    cost: Float[Tensor, "*batch"]  #: expected cost of that choice, in the unit of the costs

    @property
    def rejected(self) -> Bool[Tensor, "*batch"]:
        """True where nothing is chosen."""
        return self.choice == REJECT


def decide(probs: ArrayLike, costs: ArrayLike | None = None, *, reject_cost: float | None = None) -> Decision:
    """Return the choice of least expected cost, sum_k p_k costs[k, choice], or ``REJECT`` where that costs less.

    Chow (1970, "On optimum recognition error and reject tradeoff"). With the default costs, 1 for an error and 0 for a
    hit, it rejects where max_k p_k < 1 - ``reject_cost``. Of equal choices it takes the first, and of an equal choice
    and ``REJECT`` the choice. It is the best rule if the probabilities are calibrated.

    Args:
        probs: Class probabilities, ``(*batch, classes)``, that sum to 1.
        costs: Cost of each choice for each true class, ``(classes, choices)``; None: 0 on the diagonal, else 1.
        reject_cost: Cost of no choice, in the unit of ``costs``; None never rejects. Without ``costs`` at least 0.

    Raises:
        ShapeError: If there are fewer than two classes, or the costs have another number of rows.
        NonFiniteError: If a number is NaN or infinite.
        DataError: If they are not probabilities, e.g. logits.
        ConfigError: If the cost of rejection is negative where those of choices are 0 and 1.

    Example:
        >>> treat = decide([[0.95, 0.05], [0.7, 0.3], [0.1, 0.9]], [[0, 3], [10, 1]], reject_cost=1.0)
        >>> treat.choice.tolist(), [round(c, 2) for c in treat.cost.tolist()]
        ([0, -1, -1], [0.5, 1.0, 1.0])
    """
    p = read_probabilities(probs)
    classes = p.shape[-1]
    if costs is None:
        table = 1 - torch.eye(classes, dtype=p.dtype, device=p.device)
    else:
        table = read_numbers(costs, "costs").to(p.device, p.dtype)
        if table.ndim != 2 or len(table) != classes:
            raise ShapeError(
                f"costs must be (classes, choices) with a row for each of {classes} classes, "
                f"got shape {tuple(table.shape)}; try costs.T if it has a row for each choice"
            )
    cost, choice = (p @ table).min(-1)
    if reject_cost is None:
        return Decision(choice, cost)
    price = read_scalar(reject_cost, "reject_cost")
    if costs is None and price < 0:
        raise ConfigError(
            f"reject_cost must be at least 0, got {price:g}: the costs of 0 and 1 would reject everything"
        )
    rejects = cost > price
    return Decision(choice.masked_fill(rejects, REJECT), cost.masked_fill(rejects, price))
