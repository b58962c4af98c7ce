"""Sample: stochastic passes through one model.

Every matched leaf reads its input times a noise of mean one:

    y_m = leaf(x_m * z_m),   z ~ Bernoulli(1 - p) / (1 - p)   or   Normal(1, std)

(Gal & Ghahramani, 2016, "Dropout as a Bayesian approximation"; Srivastava et al., 2014, for the Gaussian form). At
evaluation a member's noise is a fixed function of the seed, the leaf and the feature: the same for all tokens, rows and
calls, so that each member is one consistent thinned network, with a key-value cache too, and a batch may be split at
will. In training one pass runs, with fresh noise per row. Trainable noise follows concrete dropout (Gal et al., 2017).
The risk is the members' disagreement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, Literal, ParamSpec, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfdoubt import compat, kernels, targets
from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.fields import (
    MEMBERS,
    SCALE,
    SHARED,
    FieldCheck,
    check_settings,
    choice,
    either,
    flag,
    number,
    optional,
    resolve_compile,
    whole,
)
from selfdoubt.members import Wrapped
from selfdoubt.random_numbers import scramble, uniforms
from selfdoubt.rows import ForwardContext, Replacement
from selfdoubt.targets import Leaf
from selfdoubt.wrapping import wrap

P = ParamSpec("P")

#: Sizes of noise that is "auto", until a search has found one.
START_DROPOUT, START_STD = 0.001, 0.01


@dataclass(frozen=True)
class Bernoulli:
    """Dropout: a feature is dropped with probability ``p`` in (0, 1), and the others grow by ``1 / (1 - p)``.

    "auto" starts at ``START_DROPOUT`` until a search has found the largest ``p`` that keeps the model's answers.
    """

    p: float | Literal["auto"] = 0.1
    trainable: bool = False

    kinds: ClassVar[Mapping[str, FieldCheck]] = {
        "p": either(number(above=0, below=1), choice("auto")), "trainable": flag,
    }  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self, self.kinds)

    def initial(self) -> float:
        """Return the parameter that trains: the logit of ``p``."""
        p = START_DROPOUT if isinstance(self.p, str) else self.p
        return math.log(p / (1 - p))

    @property
    def seeks_noise(self) -> bool:
        """True if the size of the noise is still to be searched."""
        return self.p == "auto"

    def with_noise(self, size: float) -> Bernoulli:
        """Return the distribution that drops with this probability."""
        return replace(self, p=size)

    @staticmethod
    def noise(parameter: Tensor, uniform: Float[Tensor, "rows features"], *, soft: bool) -> Tensor:
        """Return the noise for uniform draws; ``soft`` relaxes the step so that gradients reach ``p``."""
        p = parameter.sigmoid()
        if not soft:
            return (uniform >= p).to(p.dtype) / (1 - p)
        temperature = 0.1
        draw = uniform.clamp(1e-6, 1 - 1e-6)
        return ((draw.logit() - parameter) / temperature).sigmoid() / (1 - p)


@dataclass(frozen=True)
class Normal:
    """Multiplicative Gaussian noise of mean 1 and standard deviation ``std`` > 0.

    "auto" starts at ``START_STD`` until a search has found the largest ``std`` that keeps the model's answers.
    """

    std: float | Literal["auto"] = 0.1
    trainable: bool = False

    kinds: ClassVar[Mapping[str, FieldCheck]] = {
        "std": either(number(above=0, high=SCALE), choice("auto")), "trainable": flag,
    }  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self, self.kinds)

    def initial(self) -> float:
        """Return the parameter that trains: the logarithm of ``std``."""
        return math.log(START_STD if isinstance(self.std, str) else self.std)

    @property
    def seeks_noise(self) -> bool:
        """True if the size of the noise is still to be searched."""
        return self.std == "auto"

    def with_noise(self, size: float) -> Normal:
        """Return the distribution of this standard deviation."""
        return replace(self, std=size)

    @staticmethod
    def noise(parameter: Tensor, uniform: Float[Tensor, "rows features"], *, soft: bool) -> Tensor:  # noqa: ARG004
        """Return the noise for uniform draws; it is differentiable in ``std``."""
        eps = torch.finfo(uniform.dtype).eps
        standard = torch.special.ndtri(uniform.clamp(eps, 1 - eps))
        noise: Tensor = 1 + parameter.exp() * standard
        return noise


@dataclass(frozen=True)
class Wrapper:
    """Settings of sampling; call it with a model to wrap it, or use it as a decorator of a module class.

    Args:
        n_samples: Number of passes at evaluation, at least 1; training runs one.
        distribution: ``Normal(std)`` or ``Bernoulli(p)``, fixed or ``trainable``.
        param_filter: A regex over full parameter names; noise goes before the layers that own them. None: query and
            value projections of a decoder, or every layer but the first, norms, embeddings and attention modules.
        output: "logits" averages probabilities over the last axis, "values" averages values. "auto" takes an output
            called ``logits`` (Hugging Face) as logits and anything else as values.
        shared_inputs: Names of inputs without a batch axis, passed to all members as they are.
        compile: Compile the wrapped forward as one graph.
        verbose: 0 logs nothing, 1 a summary, 2 every matched parameter (``logging.getLogger("selfdoubt")``).
        seed: Seed of the members' noise at evaluation; training draws from torch's global generator.
        answer_from: "mean" answers with the mean over samples. "base" adds the base model as one more row at evaluation
            without noise: it alone answers, and the samples only say how far they disagree with it. None is "base"
            until the model is trained with noise, then "mean".
        symbolic_trace: Another name for ``compile``, as an argument only.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> wrapped = Wrapper(n_samples=5, distribution=Normal(0.1))(nn.Sequential(nn.Linear(4, 2)))
        >>> y, risk = wrapped(torch.ones(3, 4), return_risk=True, training=False)
        >>> y.shape == risk.shape == (3, 2)
        True
    """

    n_samples: int = 5
    distribution: Bernoulli | Normal = Normal()
    param_filter: str | None = None
    output: Literal["auto", "values", "logits"] = "auto"
    shared_inputs: tuple[str, ...] = ()
    compile: bool | None = None
    verbose: int = 0
    seed: int = 0
    answer_from: Literal["base", "mean"] | None = None
    symbolic_trace: InitVar[bool | None] = None

    goes_inside: ClassVar[bool] = True
    kinds: ClassVar[Mapping[str, FieldCheck]] = {
        "n_samples": whole(1, MEMBERS), "output": choice("auto", "values", "logits"),
        "answer_from": optional(choice("base", "mean")), **SHARED,
    }  # fmt: skip
    newer: ClassVar[frozenset[str]] = frozenset({"answer_from"})

    def __post_init__(self, symbolic_trace: bool | None) -> None:
        object.__setattr__(self, "compile", resolve_compile(self.compile, symbolic_trace))
        check_settings(self, self.kinds)
        if not isinstance(self.distribution, (Bernoulli, Normal)):
            raise ConfigError(
                f"distribution must be sample.Bernoulli(p) or sample.Normal(std), got {self.distribution!r}"
            )

    @overload
    def __call__(self, model: nn.Module) -> Wrapped: ...
    @overload
    def __call__(self, model: Callable[P, nn.Module]) -> Callable[P, Wrapped]: ...
    def __call__(self, model: Any) -> Any:
        """Wrap a model; or decorate a class of models, whose calls then build wrapped ones."""
        return wrap(self, model)

    def find(self, model: nn.Module) -> list[Leaf]:
        """Return the leaves to replace."""
        leaves = targets.find_inner_leaves(model, self.param_filter)
        for leaf in leaves:
            kernels.check_rows(model, leaf)
            if isinstance(leaf.module, nn.MultiheadAttention):
                raise WrapError(
                    f"{leaf.name} is nn.MultiheadAttention, whose projections cannot be given noise one by one; "
                    "leave it out with param_filter"
                )
        return leaves

    def make_leaf(self, leaf: Leaf, index: int, call: ForwardContext) -> nn.Module:
        """Build a leaf whose input gets noise."""
        return NoisyLeaf(leaf, index, call, self)

    def freezes(self) -> bool:
        """Return False: the model's own parameters go on training."""
        return False

    def members(self, *, training: bool) -> int:
        """Return the number of passes: one in training, else ``n_samples`` and one for a base that answers."""
        return 1 if training else self.n_samples + self.has_base

    def splits(self, *, training: bool) -> bool:  # noqa: ARG002
        """Return False: a batch is never split."""
        return False

    @property
    def start_noise(self) -> float:
        """The first ``p`` or ``std`` that a search tries."""
        return START_DROPOUT if isinstance(self.distribution, Bernoulli) else START_STD

    @property
    def largest_noise(self) -> float:
        """The largest ``p`` or ``std`` that a search tries."""
        return 0.5 if isinstance(self.distribution, Bernoulli) else 1.0

    @property
    def seeks_noise(self) -> bool:
        """True if the size of the noise is still to be searched."""
        return self.distribution.seeks_noise

    def with_noise(self, size: float) -> Wrapper:
        """Return the settings of samples with this much noise: ``p`` or ``std`` of the distribution."""
        return replace(self, distribution=self.distribution.with_noise(size))

    @property
    def has_base(self) -> bool:
        """True if at evaluation member 0 is the base model, which answers alone."""
        return self.answer_from == "base"


#: Layers whose features are in dimension 1; all others have them in the last.
_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.GroupNorm, nn.PReLU,
)  # fmt: skip


class NoisyLeaf(Replacement):
    """A leaf whose input is multiplied by noise along its feature axis (an embedding's output, as ids have none)."""

    parameter: Tensor

    def __init__(self, leaf: Leaf, index: int, call: ForwardContext, spec: Wrapper) -> None:
        super().__init__(leaf.module, call)
        self.leaf_name = leaf.name
        base = compat.get_base_layer(leaf.module)
        self.distribution = spec.distribution
        self.key = int(scramble(torch.tensor(spec.seed * 1_000_003 + index)))
        self.looks_up = isinstance(base, nn.Embedding)
        self.feature_axis = 1 if isinstance(base, _CHANNELS_FIRST) else -1
        self._kept: dict[tuple[Any, ...], tuple[tuple[int, int, int], Tensor]] = {}
        start = torch.tensor(spec.distribution.initial(), device=next(leaf.module.parameters()).device)
        if spec.distribution.trainable:
            self.parameter = nn.Parameter(start)
        else:
            self.register_buffer("parameter", start)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the leaf on noisy rows: at evaluation one fixed noise per member, in training a fresh one per row."""
        self.call.reached = True
        if self.call.only_base:
            return self.leaf(x, *args, **kwargs)
        x = self.call.per_row(x, self.leaf_name)
        if self.looks_up or not x.is_floating_point():
            return self._make_noisy(self.leaf(x, *args, **kwargs))
        return self.leaf(self._make_noisy(x), *args, **kwargs)

    @torch.no_grad()
    def set_noise(self, size: float) -> None:
        """Set ``p`` or ``std`` of the noise."""
        self.distribution = self.distribution.with_noise(size)
        self.parameter.fill_(self.distribution.initial())

    def _make_noisy(self, x: Tensor) -> Tensor:
        """Return rows times their noise; the base model's stay as they are."""
        if not self.call.training and self._can_keep():
            members, axis = self.call.members, self.feature_axis % x.ndim
            shape = [1] * (x.ndim + 1)
            shape[0], shape[axis + 1] = members, x.shape[axis]
            # The base model's noise is 1, which changes no bit.
            noise = self._keep_noise(x, axis).view(shape)
            noisy: Tensor = (x.unflatten(0, (members, -1)) * noise).flatten(0, 1)  # type: ignore[no-untyped-call]
            return noisy
        first = self.call.count_base(x)
        if not first:
            return x * self._noise(x)
        return torch.cat([x[:first], x[first:] * self._noise(x[first:])])

    def _can_keep(self) -> bool:
        """Return True where noise may outlive a call: no gradient is recorded, and a change of it can be seen."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.parameter.is_inference())

    def _keep_noise(self, x: Tensor, axis: int) -> Float[Tensor, "members features"]:
        """Return the members' noise of this type, made again where the parameter may have changed.

        Its memory stays in its place, so that a captured graph reads what was made last.
        """
        members, first, features = self.call.members, int(self.call.has_base), x.shape[axis]
        kind = members, first, features, x.dtype, x.device
        trains = self.distribution.trainable
        key = attrgetter("_version")(self.parameter), self.parameter.data_ptr(), self.call.epoch if trains else 0
        known = self._kept.get(kind)
        if known is not None and known[0] == key:
            return known[1]
        with torch.inference_mode(False), torch.no_grad():
            noise = torch.ones(members, features, dtype=x.dtype, device=x.device) if known is None else known[1]
            uniform = uniforms(self.key, members - first, features, x.device)
            noise[first:].copy_(self.distribution.noise(self.parameter, uniform, soft=False))
        self._kept[kind] = key, noise
        return noise

    def _noise(self, x: Tensor) -> Tensor:
        """Return noise that broadcasts over ``x``: ``(rows, 1, ..., features, ...)``."""
        axis = self.feature_axis % x.ndim
        rows, features, members = len(x), x.shape[axis], self.call.members - self.call.has_base
        if self.call.training:
            uniform = torch.rand(rows, features, device=x.device)
        else:
            uniform = uniforms(self.key, members, features, x.device).repeat_interleave(rows // members, 0)
        soft = self.distribution.trainable and self.call.training
        noise = self.distribution.noise(self.parameter, uniform, soft=soft)
        shape = [1] * x.ndim
        shape[0], shape[axis] = rows, features
        return noise.view(shape).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the noise that is kept, which copies make again."""
        return self.__dict__ | {"_kept": {}}
