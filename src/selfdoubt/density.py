"""Density: how far the features of an input lie from those that the model usually meets.

Nothing is trained: one pass over unlabelled data gives a Gaussian of the features that enter the head (or another
layer), and the risk is the distance from it (Lee et al., 2018, "A simple unified framework for detecting
out-of-distribution samples and adversarial attacks"). With a background, which is data of any kind, it is relative
(Ren et al., 2023, "Out-of-distribution detection and selective generation for conditional language models"):

    risk(x) = d(x) - d_background(x)

where d is the Mahalanobis distance (``gaussian.py``). Put it inside ``vote`` or ``sample`` to have members as well.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal, ParamSpec, overload

import torch
from torch import Tensor, nn

from selfdoubt import targets
from selfdoubt.errors import ConfigError, ShapeError, WrapError
from selfdoubt.fields import SHARED, WIDTH, FieldCheck, check_settings, flag, number, optional, resolve_compile, whole
from selfdoubt.forecast import check_no_nan
from selfdoubt.gaussian import Gaussian, Moments, merge
from selfdoubt.members import Wrapped, count_members, count_rows
from selfdoubt.model_inputs import read_batches
from selfdoubt.rows import ForwardContext, Replacement, expand, unfold
from selfdoubt.targets import Leaf
from selfdoubt.trained_state import TrainedState
from selfdoubt.wrapping import lift_leaf, wrap

P = ParamSpec("P")

#: How to fit a wrapped model, for error messages.
_REPAIR = "fit it on usual inputs first: density.fit(wrapped, loader)"


@dataclass(frozen=True)
class Wrapper:
    """Settings of a density; call it with a model to wrap it, and fit it by ``density.fit(wrapped, loader)``.

    Args:
        param_filter: A regex over full parameter names; the features are the input of the one layer that owns them: a
            linear or convolution layer, or a norm over the last axis. None: the head, which is the output embedding of
            a language model and the last linear or convolution layer of any other. Where the head comes right after
            a linear layer that is not the first, as in a classifier of three, that one: its input shows more.
        pooled: Measure the mean of the features over their positions, instead of each position.
        rank: Number of directions of largest variance to keep, for wide models; None keeps all.
        shrinkage: Share of the identity in the covariance, in [0, 1]; None takes that of Ledoit and Wolf.
        shared_inputs: Unused, as there is one member; kept so that all wrappers have the same fields.
        compile: Compile the wrapped forward as one graph.
        verbose: 0 logs nothing, 1 a summary, 2 every matched parameter (``logging.getLogger("selfdoubt")``).
        seed: Unused; kept so that all wrappers have the same fields.
        symbolic_trace: Another name for ``compile``, as an argument only.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> wrapped = Wrapper()(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> fit(wrapped, [torch.randn(100, 4) for _ in range(5)])
        >>> y, risk = wrapped(torch.randn(3, 4), return_risk=True)
        >>> y.shape, risk.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    param_filter: str | None = None
    pooled: bool = False
    rank: int | None = None
    shrinkage: float | None = None
    shared_inputs: tuple[str, ...] = ()
    compile: bool | None = None
    verbose: int = 0
    seed: int = 0
    symbolic_trace: InitVar[bool | None] = None

    output: ClassVar[Literal["auto", "values", "logits"]] = "auto"
    goes_inside: ClassVar[bool] = True
    has_base: ClassVar[bool] = False
    newer: ClassVar[frozenset[str]] = frozenset()  #: settings that older files lack
    kinds: ClassVar[Mapping[str, FieldCheck]] = {
        "pooled": flag,
        "rank": optional(whole(1, WIDTH)),
        "shrinkage": optional(number(0, 1)),
        **SHARED,
    }

    def __post_init__(self, symbolic_trace: bool | None) -> None:
        object.__setattr__(self, "compile", resolve_compile(self.compile, symbolic_trace))
        check_settings(self, self.kinds)

    @overload
    def __call__(self, model: nn.Module) -> Wrapped: ...
    @overload
    def __call__(self, model: Callable[P, nn.Module]) -> Callable[P, Wrapped]: ...
    def __call__(self, model: Any) -> Any:
        """Wrap a model, beneath its wrappers with members; or decorate a class, whose calls then build wrapped ones."""
        return insert(self, model) if isinstance(model, Wrapped) else wrap(self, model)

    def find(self, model: nn.Module) -> list[Leaf]:
        """Return the leaf whose input is measured.

        Raises:
            WrapError: If there are several.
        """
        if isinstance(model, nn.Module) and find_measured_leaf(model) is not None:
            raise WrapError("the model has a density already; fit that one again")
        leaves = (
            targets.find_features(model) if self.param_filter is None else targets.find_leaves(model, self.param_filter)
        )
        if len(leaves) > 1:
            names = ", ".join(leaf.name for leaf in leaves[:3])
            raise WrapError(f"density measures the input of one layer, got {len(leaves)} ({names}, ...); name one")
        return [lift_leaf(leaf, model) for leaf in leaves]

    def make_leaf(self, leaf: Leaf, index: int, call: ForwardContext) -> nn.Module:  # noqa: ARG002
        """Build a layer whose input is measured."""
        return MeasuredLeaf(leaf, call, self)

    def measure(
        self, wrapped: Wrapped, mask: Tensor | None = None, *, members: int = 1, required: bool = True
    ) -> Tensor | None:
        """Return the distances of the features of the last call, ``(rows, *positions)``.

        Args:
            wrapped: A model that this has wrapped, maybe inside of others.
            mask: Attention mask ``(batch, positions)``.
            members: Number of times that the batch was repeated.
            required: False gives None for a density that is not fitted.

        Raises:
            ConfigError: If the density is not fitted.
            WrapError: If the layer was called several times, so that it is open which input is the batch's.
            NonFiniteError: If a distance is NaN.
        """
        leaf = find_measured_leaf(wrapped)
        assert leaf is not None
        if not leaf.is_fitted and not required:
            return None
        distances = leaf.measure(leaf.read_features(mask, members=members))
        check_no_nan(unfold(distances, members).transpose(0, 1), "distances")
        return distances

    def freezes(self) -> bool:
        """Return True: what trains would make the statistics stale."""
        return True

    def members(self, *, training: bool) -> int:  # noqa: ARG002
        """Return 1."""
        return 1

    def splits(self, *, training: bool) -> bool:  # noqa: ARG002
        """Return False: a batch is never split."""
        return False


class MeasuredLeaf(Replacement):
    """A layer, and Gaussians of its usual input and of a background."""

    counts: Tensor  #: (usual, background) features that the Gaussians were fitted on

    def __init__(self, leaf: Leaf, call: ForwardContext, spec: Wrapper) -> None:
        super().__init__(leaf.module, call)
        width, self.axis = targets.find_input_width(leaf)
        self.pooled, self.shrinkage = spec.pooled, spec.shrinkage
        self.usual = Gaussian(width, spec.rank)
        self.background = Gaussian(width, spec.rank)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        device = next(leaf.module.parameters()).device
        for name in ("usual", "background", "counts"):
            setattr(self, name, getattr(self, name).to(device))

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; its input is left with the call."""
        self.call.reached = True
        self.call.features.append(h.detach())
        return self.leaf(h, *args, **kwargs)

    @property
    def is_fitted(self) -> bool:
        """True if the statistics of usual features are there."""
        return bool(self.counts[0])

    @property
    def has_background(self) -> bool:
        """True if the statistics of a background are there."""
        return bool(self.counts[1])

    def read_features(self, mask: Tensor | None = None, *, members: int = 1) -> Tensor:
        """Return the features of the last call, ``(rows, *positions, width)``; pooled ones ``(rows, width)``.

        Args:
            mask: Attention mask ``(batch, positions)``; where it is 0 features do not count for the mean.
            members: Number of members; the mask is repeated for each.

        Raises:
            WrapError: If the layer was called several times.
            ShapeError: If the features have no batch axis.
        """
        if len(self.call.features) != 1:
            raise WrapError(
                f"density needs a layer that is called once, and this one was called {len(self.call.features)} times; "
                "name another with param_filter"
            )
        features = self.call.features[0].movedim(self.axis, -1)
        if features.ndim < 2:
            raise ShapeError(
                f"density measures features of shape (batch, ..., width), got {tuple(features.shape)}; "
                "give the model a batch, e.g. x[None] for one row"
            )
        if not self.pooled or features.ndim == 2:
            return features
        used = _match_mask(mask, features, members)
        if used is None:
            return features.flatten(1, -2).mean(1)
        weights = used / used.sum(1, keepdim=True).clamp_min(1)
        return torch.einsum("rt,rtd->rd", weights.to(features.dtype), features.masked_fill(~used[..., None], 0))

    def measure(self, features: Tensor) -> Tensor:
        """Return the distance of each feature, less that to the background if there is one.

        Raises:
            ConfigError: If the density is not fitted.
        """
        if not self.is_fitted:
            raise ConfigError(f"this density has no statistics yet; {_REPAIR}")
        # A background that was not fitted is 0 everywhere.
        distances: Tensor = self.usual(features) - self.background(features)
        return distances

    def take(self, usual: Moments, background: Moments | None = None) -> None:
        """Fit the Gaussians to the moments of features.

        Raises:
            DataError: If there are too few features for a covariance.
        """
        self.usual.fit(usual, self.shrinkage)
        if background is None:
            for buffer in self.background.buffers():
                buffer.zero_()
        else:
            self.background.fit(background, self.shrinkage)
        counts = [0 if moments is None else int(moments.count) for moments in (usual, background)]
        self.counts.copy_(torch.tensor(counts))


def find_measured_leaf(model: nn.Module) -> MeasuredLeaf | None:
    """Return the layer whose input is measured; None in a model without a density."""
    return next((m for m in model.modules() if isinstance(m, MeasuredLeaf)), None)


def fit(wrapped: nn.Module, loader: Iterable[Any], background: Iterable[Any] | None = None) -> None:
    """Fit the density of a wrapped model in one pass, without labels and gradients, in evaluation mode.

    With ``torch.distributed``, each process reads its own share, and all get the same statistics.

    Args:
        wrapped: A model that ``density.Wrapper`` has wrapped; also inside ``vote`` or ``sample``.
        loader: Batches of usual inputs, without labels: a tensor, a tuple of the inputs that the model requires, or a
            mapping of inputs by name. Where an ``attention_mask`` has the features' positions, padding does not count.
        background: Batches of inputs of any kind, for the relative distance; None takes the plain distance.

    Raises:
        ConfigError: If the model has no density.
        DataError: If there are no batches, too few features for a covariance, or more inputs in a batch than the model
            requires.
        NonFiniteError: If a feature is NaN or infinite.
    """
    leaf = find_measured_leaf(wrapped)
    if leaf is None or not isinstance(wrapped, Wrapped):
        raise ConfigError("the model has no density to fit; wrap it first: density.Wrapper()(model)")
    modes = {module: module.training for module in wrapped.modules()}
    wrapped.eval()
    try:
        usual = _sum_features(wrapped, leaf, loader)
        leaf.take(usual, None if background is None else _sum_features(wrapped, leaf, background))
    finally:
        for module, training in modes.items():
            module.training = training


def insert(spec: Wrapper, model: nn.Module) -> Wrapped:
    """Wrap a model beneath those of its wrappers that have members; a model without such a wrapper as usual.

    The result is as if the density had come first, and the model itself stays as it was.

    Raises:
        WrapError: If the outer wrapper's ``param_filter`` would match other layers then.
    """
    if not isinstance(model, Wrapped) or count_rows(model) == 1:
        return Wrapped(model, spec)
    pattern: str | None = getattr(model.spec, "param_filter", None)
    names = [name for name, _ in model.module.named_parameters()]
    if pattern is not None and any(
        (re.search(pattern, name) is None) != (re.search(pattern, f"module.{name}") is None) for name in names
    ):
        raise WrapError(
            f"param_filter={pattern!r} reads the beginning of names, which a density beneath changes; wrap the model "
            "with density first, and then with a filter for names that begin with 'module.'"
        )
    outer = copy.copy(model)
    outer._modules = dict(model._modules)
    outer.module = inner = spec(model.module)
    # The copies of the leaves that the outer wrapper replaced share a context of their own, which it must use.
    replaced = inner.module.get_submodule(model.leaf_names[0])
    replaced = replaced.leaf if isinstance(replaced, MeasuredLeaf) else replaced
    assert isinstance(replaced, Replacement)
    outer.call = replaced.call
    outer.leaf_names = [f"module.{name}" for name in model.leaf_names]
    outer.note_layers()
    outer._graph = None
    outer._trained_state = TrainedState(outer, outer.list_member_parameters(), trained=model.is_trained)
    return outer


@torch.no_grad()
def _sum_features(wrapped: Wrapped, leaf: MeasuredLeaf, loader: Iterable[Any]) -> Moments:
    moments: Moments | None = None
    members = count_members(wrapped) + wrapped.answers_from_base
    for args, kwargs in read_batches(loader, wrapped.input_names):
        wrapped.forecast(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        features = leaf.read_features(mask, members=members)
        used = None if leaf.pooled else _match_mask(mask, features, members)
        chosen = Moments.sum(features.flatten(0, -2) if used is None else features[used])
        moments = chosen if moments is None else merge(moments, chosen)
    assert moments is not None
    return moments.reduce()


def _match_mask(mask: Any, features: Tensor, members: int) -> Tensor | None:
    """Return where features are not padding; None if the mask is not over their positions."""
    if not isinstance(mask, Tensor) or mask.shape != (features.shape[0] // members, *features.shape[1:-1]):
        return None
    return expand(mask, members).bool()
