"""Uniform numbers that are a function of their place, without a generator's state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def uniforms(key: int, members: int, features: int, device: torch.device) -> Float[Tensor, "members features"]:
    """Draw uniform numbers in [0, 1) that depend on the key, the member and the feature only, alike on every device.

    A counter-based generator: each cell's counter goes through a 64-bit finaliser twice (Salmon et al., 2011, "Parallel
    random numbers: as easy as 1, 2, 3", for the idea; Steele et al., 2014, SplitMix64, for the finaliser).
    """
    member = torch.arange(members, device=device)[:, None]
    feature = torch.arange(features, device=device)[None]
    bits = scramble(scramble(member * 2**32 + feature + 1) ^ key)
    # 24 bits: what a float32 in [0, 1) can hold.
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24


def scramble(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to int64, whose products wrap around; ``>>`` keeps the sign, hence the masks."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
