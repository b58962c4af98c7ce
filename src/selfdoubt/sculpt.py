"""Sculpt: a model that predicts its own spread.

The head keeps its weights and gets a scale branch of ``n_layers`` layers on the same input:

    y = head(h),   scale = softplus(branch(h)),   target ~ distribution(y, scale)

(Nix & Weigend, 1994; Kendall & Gal, 2017, "What uncertainties do we need in Bayesian deep learning?"). It trains with
the task loss on ``distribution.sample((y, scale))``, or with ``distribution.nll``. The risk is the scale: noise in the
data that more data would not remove. Put it inside ``vote`` or ``sample`` to get both kinds at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal, ParamSpec, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from selfdoubt import compat, targets
from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.fields import SHARED, WIDTH, FieldCheck, check_settings, number, optional, resolve_compile, whole
from selfdoubt.members import Wrapped
from selfdoubt.rows import ForwardContext, Replacement, is_autocasting
from selfdoubt.targets import Leaf
from selfdoubt.tree import tree_map
from selfdoubt.wrapping import wrap

P = ParamSpec("P")

#: ``(y, scale)`` as ``wrapped(..., return_risk=True)`` returns it: two tensors, or two trees of them.
MeanAndScale: TypeAlias = tuple[Any, Any]


@dataclass(frozen=True)
class Normal:
    """A normal distribution with mean ``y`` and standard deviation ``scale``.

    It has no settings: the class itself and an instance are the same to its methods and to ``Wrapper``.
    """

    @staticmethod
    def mean(pair: MeanAndScale) -> Any:
        """Return the mean: ``y``."""
        return pair[0]

    @staticmethod
    def std(pair: MeanAndScale) -> Any:
        """Return the standard deviation: ``scale``."""
        return pair[1]

    @staticmethod
    def sample(pair: MeanAndScale, *, generator: torch.Generator | None = None) -> Any:
        """Draw once, differentiable in both; outputs without a scale stay as they are."""

        def draw(y: Any, scale: Tensor | None) -> Any:
            if scale is None:
                return y
            noise = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
            return y + scale.to(y.dtype) * noise

        return tree_map(draw, *pair)

    @staticmethod
    def nll(pair: MeanAndScale, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of each target, nats.

        Raises:
            ConfigError: If there is no scale.
        """
        y, scale = _read_pair(pair)
        return 0.5 * ((target - y) / scale).square() + scale.log() + 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Laplace:
    """A Laplace distribution with mean ``y`` and scale ``b``; class and instance are the same, as in ``Normal``."""

    @staticmethod
    def mean(pair: MeanAndScale) -> Any:
        """Return the mean: ``y``."""
        return pair[0]

    @staticmethod
    def std(pair: MeanAndScale) -> Any:
        """Return the standard deviation: ``sqrt(2) b``."""
        return tree_map(lambda scale: None if scale is None else scale * math.sqrt(2), pair[1])

    @staticmethod
    def sample(pair: MeanAndScale, *, generator: torch.Generator | None = None) -> Any:
        """Draw once by the inverse of the distribution function, differentiable in both."""

        def draw(y: Any, scale: Tensor | None) -> Any:
            if scale is None:
                return y
            uniform = torch.rand(y.shape, generator=generator, device=y.device, dtype=torch.float32) - 0.5
            tail = (1 - 2 * uniform.abs()).clamp_min(torch.finfo(torch.float32).tiny)
            return y - scale.to(y.dtype) * (uniform.sign() * tail.log()).to(y.dtype)

        return tree_map(draw, *pair)

    @staticmethod
    def nll(pair: MeanAndScale, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of each target, nats.

        Raises:
            ConfigError: If there is no scale.
        """
        y, scale = _read_pair(pair)
        return (target - y).abs() / scale + scale.log() + math.log(2)


@dataclass(frozen=True)
class Wrapper:
    """Settings of a predicted spread; call it with a model to wrap it, or use it as a decorator of a module class.

    Args:
        distribution: ``Normal`` or ``Laplace``, the class or an instance; the class is kept.
        n_layers: Layers of the scale branch, at least 1.
        rank: Width of the branch between its layers. With one layer: its rank, or None for a full layer.
        param_filter: A regex over full parameter names; the layers that own them are heads, and their outputs must be
            outputs of the model. None: the output embedding of a language model, the last layer of any other.
        initial_scale: The scale everywhere before training, above 0.
        shared_inputs: Unused, as there is one member; kept so that all wrappers have the same fields.
        compile: Compile the wrapped forward as one graph.
        verbose: 0 logs nothing, 1 a summary, 2 every matched parameter (``logging.getLogger("selfdoubt")``).
        seed: Seed of the branch's initial weights.
        symbolic_trace: Another name for ``compile``, as an argument only.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> wrapped = Wrapper(distribution=Normal)(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
        >>> y, risk = wrapped(torch.ones(3, 4), return_risk=True)
        >>> Normal.nll((y, risk), torch.zeros(3, 1)).shape
        torch.Size([3, 1])
    """

    distribution: type[Normal] | type[Laplace] | Normal | Laplace = Normal
    n_layers: int = 2
    rank: int | None = 16
    param_filter: str | None = None
    initial_scale: float = 0.1
    shared_inputs: tuple[str, ...] = ()
    compile: bool | None = None
    verbose: int = 0
    seed: int = 0
    symbolic_trace: InitVar[bool | None] = None

    output: ClassVar[Literal["auto", "values", "logits"]] = "auto"
    goes_inside: ClassVar[bool] = True
    has_base: ClassVar[bool] = False
    newer: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[Mapping[str, FieldCheck]] = {
        "n_layers": whole(1, 64),
        "rank": optional(whole(1, WIDTH)),
        "initial_scale": number(above=0, high=100),
        **SHARED,
    }

    def __post_init__(self, symbolic_trace: bool | None) -> None:
        object.__setattr__(self, "compile", resolve_compile(self.compile, symbolic_trace))
        if isinstance(self.distribution, (Normal, Laplace)):
            object.__setattr__(self, "distribution", type(self.distribution))
        if self.distribution not in (Normal, Laplace):
            raise ConfigError(f"distribution must be sculpt.Normal or sculpt.Laplace, got {self.distribution!r}")
        check_settings(self, self.kinds)
        if self.rank is None and self.n_layers > 1:
            raise ConfigError(f"a branch of {self.n_layers} layers needs a width; try rank=16")

    @overload
    def __call__(self, model: nn.Module) -> Wrapped: ...
    @overload
    def __call__(self, model: Callable[P, nn.Module]) -> Callable[P, Wrapped]: ...
    def __call__(self, model: Any) -> Any:
        """Wrap a model; or decorate a class of models, whose calls then build wrapped ones."""
        return wrap(self, model)

    def find(self, model: nn.Module) -> list[Leaf]:
        """Return the heads."""
        if self.param_filter is not None:
            return targets.find_leaves(model, self.param_filter)
        return targets.find_heads(model)

    def make_leaf(self, leaf: Leaf, index: int, call: ForwardContext) -> nn.Module:
        """Build a head with a scale branch."""
        if not targets.is_head(leaf):
            raise WrapError(
                f"a head must be a linear or convolution layer, and {leaf.name} is {type(leaf.module).__name__}; "
                "name another with param_filter"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + index)
            return ScaledHead(leaf, call, self)

    def freezes(self) -> bool:
        """Return False: the model's own parameters go on training."""
        return False

    def members(self, *, training: bool) -> int:  # noqa: ARG002
        """Return 1."""
        return 1

    def splits(self, *, training: bool) -> bool:  # noqa: ARG002
        """Return False: a batch is never split."""
        return False


class ScaledHead(Replacement):
    """A head and a branch that predicts the scale of each of its outputs."""

    def __init__(self, leaf: Leaf, call: ForwardContext, spec: Wrapper) -> None:
        super().__init__(leaf.module, call)
        self.branch = _branch(compat.get_base_layer(leaf.module), spec)
        parameter = next(leaf.module.parameters())
        dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
        self.branch.to(parameter.device, dtype)

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the head; the scale of its output is left with the call."""
        self.call.reached = True
        y: Tensor = self.leaf(h, *args, **kwargs)
        self.call.scales.append((y, self.scale(h)))
        return y

    def scale(self, h: Tensor) -> Tensor:
        """Predict the scale of the head's outputs for its inputs, above 0."""
        scale = self.raw_scale(h)
        # A scale of exactly 0 would make every error infinitely unlikely.
        return F.softplus(scale) + torch.finfo(scale.dtype).tiny

    def raw_scale(self, h: Tensor) -> Tensor:
        """Predict the scale before its softplus, which makes it positive."""
        # The branch may have been packed into 4 bits: its biases still have the dtype.
        dtype = next((p.dtype for p in self.branch.parameters() if p.is_floating_point()), h.dtype)
        h = h if is_autocasting(h) else h.to(dtype)
        head = self.leaf
        while isinstance(head, Replacement):
            head = head.leaf
        if self.call.has_base and torch.is_grad_enabled() and not any(p.requires_grad for p in head.parameters()):
            # A frozen base answers, and no gradient reaches a weight: the scale must not learn alone.
            fixed = {name: p.detach() for name, p in self.branch.named_parameters()}
            raw: Tensor = functional_call(self.branch, fixed, (h,))
            return raw
        raw = self.branch(h)
        return raw


def _branch(head: nn.Module, spec: Wrapper) -> nn.Sequential:
    """Build ``n_layers`` layers with GELU between; the last has the head's geometry and gives ``initial_scale``."""
    layers: list[nn.Module] = []
    if isinstance(head, (nn.Conv1d, nn.Conv2d)):
        point = type(head)
        width = head.in_channels
        for _ in range(spec.n_layers - 1):
            assert spec.rank is not None
            layers += [point(width, spec.rank, 1), nn.GELU()]
            width = spec.rank
        last: nn.Linear | nn.Conv1d | nn.Conv2d = point(
            width, head.out_channels, head.kernel_size, head.stride, head.padding, head.dilation,  # type: ignore[arg-type]
            head.groups if spec.n_layers == 1 else 1, padding_mode=head.padding_mode,
        )  # fmt: skip
    else:
        weight = head.get_parameter("weight")
        fan_in, fan_out = weight.shape if compat.is_transposed(head) else (
            getattr(head, "in_features", weight.shape[-1]), getattr(head, "out_features", weight.shape[0])
        )  # fmt: skip
        for _ in range(spec.n_layers - 1):
            assert spec.rank is not None
            layers += [nn.Linear(fan_in, spec.rank), nn.GELU()]
            fan_in = spec.rank
        if spec.n_layers == 1 and spec.rank is not None and spec.rank < min(fan_in, fan_out):
            layers += [nn.Linear(fan_in, spec.rank, bias=False)]
            fan_in = spec.rank
        last = nn.Linear(fan_in, fan_out)
    assert last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, math.log(math.expm1(spec.initial_scale)))
    return nn.Sequential(*layers, last)


def _read_pair(pair: MeanAndScale) -> tuple[Tensor, Tensor]:
    """Check that a prediction has a scale."""
    y, scale = pair
    if not isinstance(y, Tensor) or not isinstance(scale, Tensor):
        raise ConfigError(
            f"a likelihood needs one output and its scale, two tensors, got {type(y).__name__} and "
            f"{type(scale).__name__}; give the output of a head that sculpt.Wrapper replaced"
        )
    return y, scale
