"""Adds low-rank deviations to the outputs of linear leaves with few kernels, where no gradient is recorded.

A leaf's output is changed in place by ``baddbmm``. Leaves that read the same tensor, such as the query, key and value
projections of a block, share their first product: their first factors are stacked, one beneath the other. On a CPU,
products of a few rows in half precision cost several times those in float32, because each of them is set up by
the library below each time; there, copies of the factors in float32 are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfdoubt import kernels
from selfdoubt.compat import get_base_layer, is_transposed
from selfdoubt.rows import ForwardContext, is_autocasting

#: Names of leaves that read the same input in the models of Hugging Face, if they have one parent.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"),
    ("q", "k", "v"), ("gate_proj", "up_proj"), ("w1", "w3"),
)  # fmt: skip
#: Rows per member up to which products on a CPU are computed in float32 for factors in half precision.
FEW_ROWS = 8
# Torch has no public names for these that are as fast.
_children, _parameters = attrgetter("_modules"), attrgetter("_parameters")
_hooks, _number = attrgetter("_forward_hooks"), attrgetter("_version")
_HALF = (torch.bfloat16, torch.float16)


class _Stack(NamedTuple):
    """The factors of a group's leaves, as they were when they were copied."""

    key: tuple[int, ...]  #: versions and addresses of the parameters
    epoch: int
    a: Float[Tensor, "members ranks in"]
    transposed: Float[Tensor, "members in ranks"]  #: a view of ``a``
    ranks: dict[int, int]  #: of each leaf, by its place in the group, in the order of the stack
    b: dict[int, Float[Tensor, "members rank out"]]


class _Products(NamedTuple):
    """The first products of a group's leaves with one input, each of which one leaf takes."""

    x: Tensor  #: the input, as the leaves got it
    version: int  #: version of the input, whose values a model could change in place; 0 in inference mode
    forward: int  #: the run of the model in which they were computed
    stack: _Stack
    left: dict[int, Float[Tensor, "members rows rank"]]  #: those that no leaf has taken, by the leaf's place


class FactorGroup:
    """Linear leaves that read the same input, if they do: their first products are one.

    Stacked factors are copies. They are made again in each run of a model that does not say that its parameters are the
    same (``ForwardContext.epoch``), and where a parameter's version or address is another one. The memory of a stack
    stays in its place, so that a captured graph reads what was copied last.
    """

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._stacks: dict[bool, _Stack] = {}  # by: is it in float32, for half-precision factors
        self._products: _Products | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies need: they make stacks and products of their own."""
        return {"_leaves": self._leaves, "_stacks": {}, "_products": None}

    def add(self, leaf: Any) -> int:
        """Add a leaf with ``deviations`` and a ``kernel``; return its place in the group."""
        self._leaves.append(leaf)
        return len(self._leaves) - 1

    def move(self, place: int, x: Tensor, y: Tensor, alpha: float, call: ForwardContext) -> bool:
        """Add a leaf's deviations to its output in place; the rows of the base model stay as they are.

        Args:
            place: Place of the leaf.
            x: Input of the leaf, ``(rows, ..., in)``.
            y: Output of the layer without deviations, ``(rows, ..., out)``.
            alpha: Scale of the deviations.
            call: State of the run.

        Returns:
            False if nothing was done: a gradient is recorded, or the output has another type or layout than this takes.
        """
        leaf = self._leaves[place]
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or call.active is not None or leaf.kernel is not kernels.linear:
            return False
        if x.dtype != y.dtype or not y.is_contiguous():
            return False
        # All this is asked for in every layer of every step, and attributes of modules are slow to look up.
        deviations = leaf.deviations if compiling else _parameters(_children(leaf)["deviations"])
        if not compiling:
            if _hooks(_children(leaf)["leaf"]):  # a hook of the frozen layer may have kept its output
                return False
            products = self._find_products(place, x, deviations, call)
            if products is not None:
                product, b = products.left.pop(place), products.stack.b[place]
                voters = _split(y, len(b), call)
                if b.dtype == y.dtype:
                    voters.baddbmm_(product, b, alpha=alpha)
                else:
                    voters.add_(torch.bmm(product, b), alpha=alpha)
                _add_bias(voters, deviations, alpha)
                return True
        return self._move_alone(leaf.leaf, deviations, x, y, alpha, call)

    def _move_alone(
        self,
        frozen: nn.Module,
        deviations: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        alpha: float,
        call: ForwardContext,
    ) -> bool:
        """Do what ``move`` does, with no other leaf's help."""
        known = next(iter(deviations.values()))
        if known.dtype != y.dtype or is_autocasting(x):
            return False
        rows, voters = _split(x, len(known), call), _split(y, len(known), call)
        if "weight_a" in deviations:
            product = rows @ deviations["weight_a"].transpose(1, 2)
            voters.baddbmm_(product, deviations["weight_b"], alpha=alpha)
        elif "weight" in deviations:
            weight = deviations["weight"]
            transposed = is_transposed(get_base_layer(frozen))
            voters.baddbmm_(rows, weight if transposed else weight.transpose(1, 2), alpha=alpha)
        _add_bias(voters, deviations, alpha)
        return True

    def _find_products(
        self, place: int, x: Tensor, deviations: Mapping[str, Tensor], call: ForwardContext
    ) -> _Products | None:
        """Return the group's first products with an input, which are computed once in a run.

        None where this leaf's is not among them: it has no factors, or they are not stacked.
        """
        products = self._products
        if (
            products is not None
            and products.x is x
            and products.forward == call.forwards
            and products.version == _version(x)
            and place in products.left
        ):
            if len(products.left) == 1:
                self._products = None
            return products
        a = deviations.get("weight_a")
        if a is None or a.dtype != x.dtype or is_autocasting(x):
            return None
        in_float32, rows = x.dtype in _HALF and x.is_cpu, _split(x, len(a), call)
        if in_float32 and rows.shape[1] > FEW_ROWS:
            return None
        stack = self._refresh(in_float32, call.epoch)
        if stack is None or place not in stack.ranks:
            return None
        product = torch.bmm(rows.float() if in_float32 else rows, stack.transposed)
        sizes = list(stack.ranks.values())
        each = product.split_with_sizes(sizes, -1) if len(sizes) > 1 else [product]
        products = _Products(x, _version(x), call.forwards, stack, dict(zip(stack.ranks, each, strict=True)))
        if len(each) > 1:
            self._products = products
        return products

    def _refresh(self, in_float32: bool, epoch: int) -> _Stack | None:
        """Return the group's stack, made again where parameters may have changed; None where there can be none."""
        factors: dict[int, tuple[Tensor, Tensor]] = {}
        key: list[int] = []
        for place, leaf in enumerate(self._leaves):
            known = _parameters(_children(leaf)["deviations"])
            a, b = known.get("weight_a"), known.get("weight_b")
            if a is None or b is None or leaf.kernel is None:
                continue
            # Inference tensors have no version, and those of other kinds (sharded ones) no address.
            if type(a) is not nn.Parameter or type(b) is not nn.Parameter or a.is_inference() or b.is_inference():
                return None
            factors[place] = a, b
            key += (place, _number(a), a.data_ptr(), _number(b), b.data_ptr())
        stack = self._stacks.get(in_float32)
        if stack is not None and stack.epoch == epoch and stack.key == tuple(key):
            return stack
        firsts = [a for a, _ in factors.values()]
        if not firsts or any(_describe(a) != _describe(firsts[0]) for a in firsts):
            return None
        with torch.inference_mode(False), torch.no_grad():
            stack = _copy(factors, stack, in_float32=in_float32)._replace(key=tuple(key), epoch=epoch)
        self._stacks[in_float32] = stack
        return stack


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else _number(x)


def _split(x: Tensor, members: int, call: ForwardContext) -> Float[Tensor, "members entries width"]:
    """Return the voters' part of a leaf's input or output."""
    first = call.count_base(x)
    x = x[first:] if first else x
    return x if x.ndim == 3 and x.shape[0] == members else x.reshape(members, -1, x.shape[-1])


def _add_bias(voters: Tensor, deviations: Any, alpha: float) -> None:
    if "bias" in deviations:
        voters.add_(deviations["bias"][:, None], alpha=alpha)


def _describe(a: Tensor) -> tuple[Any, ...]:
    """Return what first factors must have in common to be stacked."""
    return len(a), a.shape[2], a.dtype, a.device


def _copy(factors: dict[int, tuple[Tensor, Tensor]], before: _Stack | None, *, in_float32: bool) -> _Stack:
    """Stack first factors, into the memory of the stack before where it fits; one alone is not copied."""
    ranks = {place: a.shape[1] for place, (a, _) in factors.items()}
    first = next(iter(factors.values()))[0]
    if in_float32:
        second = {place: _into(None if before is None else before.b.get(place), b) for place, (_, b) in factors.items()}
    else:
        second = {place: b.detach() for place, (_, b) in factors.items()}
        if len(factors) == 1:
            return _Stack((), 0, first.detach(), first.detach().transpose(1, 2), ranks, second)
    shape, dtype = (len(first), sum(ranks.values()), first.shape[2]), torch.float32 if in_float32 else first.dtype
    stacked = None if before is None else before.a
    if stacked is None or (stacked.shape, stacked.dtype, stacked.device) != (shape, dtype, first.device):
        stacked = torch.empty(shape, dtype=dtype, device=first.device)
    for part, (a, _) in zip(stacked.split_with_sizes(list(ranks.values()), 1), factors.values(), strict=True):
        part.copy_(a)
    return _Stack((), 0, stacked, stacked.transpose(1, 2), ranks, second)


def _into(before: Tensor | None, b: Tensor) -> Tensor:
    """Return a factor in float32, in the memory of the one before where it fits."""
    if before is None or before.shape != b.shape or before.device != b.device:
        return b.float()
    return before.copy_(b)


def find_group(name: str, groups: dict[tuple[str, int], FactorGroup]) -> FactorGroup:
    """Return the group of a leaf by its name: that of its siblings, or one of its own.

    Args:
        name: Full name of the leaf.
        groups: The groups so far, by parent and kind; a new one is added.
    """
    parent, _, last = name.rpartition(".")
    for kind, names in enumerate(SIBLINGS):
        if last in names:
            return groups.setdefault((parent, kind), FactorGroup())
    return FactorGroup()
