"""RAUQ: the doubt of an answer from its tokens' probabilities and one attention weight each."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

#: Weight of a token's own probability; the value of the paper and of lm-polygraph for models of any kind.
ALPHA = 0.2


def compute_rauq(
    logprobs: Float[np.ndarray, " tokens"], attention: Float[np.ndarray, "tokens layers heads"], alpha: float = ALPHA
) -> float:
    """Return RAUQ, nats, >= 0: the largest over layers of the mean of -log c_i over an answer's tokens.

    c_1 = p_1, c_i = alpha p_i + (1 - alpha) a_i c_{i-1}, where a_i is the weight of the position that predicts token i
    on itself, in each layer in the head where the mean of a_2, a_3, ... is largest (Vazhentsev et al., 2025,
    "Uncertainty-aware attention heads", as lm-polygraph computes it, less its constant 1).

    Args:
        logprobs: Log-probabilities of the answer's tokens.
        attention: Weights where each token is predicted; the first token's are not read.
        alpha: Weight of a token's own probability, in (0, 1].

    Example:
        >>> round(compute_rauq(np.log([0.5, 0.25]), np.ones((2, 1, 1))), 4)
        0.7458
    """
    logprobs, weights = logprobs.astype(np.float64), attention[1:].astype(np.float64)
    layers = np.arange(attention.shape[1])
    with np.errstate(divide="ignore"):  # a weight may be 0
        if len(weights):
            weights = np.log(weights[:, layers, weights.mean(0).argmax(-1)]) + np.log1p(-alpha)
        now = np.full(len(layers), logprobs[0])
        summed = now
        for logprob, weight in zip(logprobs[1:] + np.log(alpha), weights, strict=True):
            now = np.logaddexp(logprob, weight + now)
            summed = summed + now
    return max(0.0, float((-summed / len(logprobs)).max()))
