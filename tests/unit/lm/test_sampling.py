"""The choice of tokens with settings in tensors is the choice with settings per sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.distributions import Distributions
from selfdoubt.lm.sampling import Sampling, choose_on_device, choose_tokens, find_draws
from selfdoubt.lm.static.turn import describe_sampling

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.5, 1e6]),
    top_p=st.sampled_from([1e-9, 0.2, 0.9, 0.999, 1.0]),
)


@given(
    st.lists(SAMPLINGS, min_size=1, max_size=6), st.integers(0, 999), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_choices_on_the_device_are_the_choices(samplings, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(len(samplings), 50, generator=generator)).to(dtype)
    uniform = torch.rand(len(samplings), generator=generator, dtype=torch.float64)
    uniform[0] = (0.0, 1 - 2**-53)[seed % 2]
    settings = describe_sampling(samplings, list(uniform))
    answer = Distributions.measure(logits)
    chosen = choose_on_device(answer, settings[0], settings[1], settings[2], find_draws(samplings))
    assert chosen.tolist() == choose_tokens(answer, samplings, uniform).tolist()


def test_the_kind_of_draws_is_the_cheapest_that_serves_all():
    greedy, plain, top_p = Sampling(top_p=0.5), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)
    assert [find_draws(s) for s in ([greedy], [greedy, plain], [plain, top_p])] == ["greedy", "drawn", "top_p"]


@pytest.mark.parametrize("draws", ["greedy", "drawn", "top_p"])
def test_logits_that_are_not_numbers_choose_a_token_that_there_is(draws):
    logits = torch.tensor([[torch.nan, 1.0], [torch.inf, -torch.inf], [torch.nan, torch.nan]])
    settings = torch.tensor([[1.0] * 3, [0.5] * 3, [0.7] * 3], dtype=torch.float64)
    chosen = choose_on_device(Distributions.measure(logits), settings[0], settings[1], settings[2], draws)
    assert ((chosen >= 0) & (chosen < 2)).all()
