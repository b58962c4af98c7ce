"""One home for Hypothesis strategies."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)
members = st.integers(1, 6)


@st.composite
def logits(draw: st.DrawFn, min_members: int = 1) -> Tensor:
    """Logits ``(members, batch, classes)`` from flat to nearly one-hot, float64."""
    shape = (draw(st.integers(min_members, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 9)))
    temperature = draw(st.sampled_from([1e-3, 1.0, 30.0, 1000.0]))
    return temperature * torch.randn(shape, generator=torch.Generator().manual_seed(draw(seeds)), dtype=torch.float64)


@st.composite
def trees(draw: st.DrawFn) -> object:
    """Tensors, numbers and None in nested tuples, lists and dicts."""
    leaves = st.one_of(st.none(), st.integers(), st.integers(1, 3).map(torch.ones))
    return draw(
        st.recursive(
            leaves,
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.lists(inner, max_size=3).map(tuple),
                st.dictionaries(st.text(max_size=3), inner, max_size=3),
            ),
            max_leaves=8,
        )
    )


@st.composite
def judged_answers(draw: st.DrawFn, both: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Risks with many or no ties, and which answers are right; with ``both`` some are and some are not."""
    n = draw(st.integers(2, 40))
    random = np.random.default_rng(draw(seeds))
    values = random.integers(draw(st.sampled_from([1, 3, 10, 10_000])), size=n)
    correct = random.random(n) < draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    if both:
        correct[:2] = [True, False]
    return values / 7.0, correct
