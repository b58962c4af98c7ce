"""Types that a caller sees of wrappers: a module becomes ``Wrapped``, a class a builder with the class's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_type

from torch import Tensor, nn

from selfdoubt import Wrapped, sample, sculpt, vote


class Net(nn.Module):
    """A class whose instances are wrapped where they are made."""

    def __init__(self, width: int, *, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def check_modules(model: nn.Module, net: Net) -> None:
    assert_type(vote.Wrapper()(model), Wrapped)
    assert_type(sample.Wrapper()(net), Wrapped)
    assert_type(sculpt.Wrapper(distribution=sculpt.Laplace())(net), Wrapped)
    assert_type(vote.Wrapper()(sculpt.Wrapper()(model)), Wrapped)


def check_classes() -> None:
    build: Callable[[int], Wrapped] = sample.Wrapper()(Net)
    assert_type(build(3), Wrapped)
    assert_type(sculpt.Wrapper()(Net)(3, depth=2), Wrapped)
    sculpt.Wrapper()(Net)("three")  # type: ignore[arg-type]
    vote.Wrapper()(3)  # type: ignore[call-overload]
