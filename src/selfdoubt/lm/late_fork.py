"""Late fork: below the first decoder layer that a wrapper changes, all members are one row.

A Hugging Face model gets one row per sequence. At the first layer with a replaced leaf its hidden states are repeated
for every member, and so is all that the model hands to that layer and to each above: masks, positions and rotary
tables. The key-value cache follows by itself: below the fork it has one row per sequence, above it one per member.

The late fork must give what the full one gives. Where a check on a few tokens says otherwise, or a model has no plain
stack of layers, members are rows from the beginning on, and a warning names the reason.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from selfdoubt.compat import get_output_head
from selfdoubt.errors import ConfigError, SlowWarning, WrapError
from selfdoubt.lm.hidden_states import find_decoder_layers
from selfdoubt.members import Wrapped, count_rows
from selfdoubt.rows import ForwardContext, expand
from selfdoubt.wrapping import innermost

#: Arguments of decoder layers that have one row per sequence (or one for all), and the numbers of their dimensions.
_GROWS: Mapping[str, tuple[int, ...]] = {
    "hidden_states": (3,), "attention_mask": (2, 4), "position_ids": (2,), "position_embeddings": (3,),
    "position_embeddings_global": (3,), "position_embeddings_local": (3,),
}  # fmt: skip
#: Largest difference between logits of both forks, relative to the largest logit: products of other numbers of rows
#: round at other places.
TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.02}
TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class LateFork:
    """The layers of a model from the first with members on, and their arguments' names."""

    first: int  #: number of the first layer with members
    layers: tuple[nn.Module, ...]
    names: tuple[tuple[str, ...], ...]
    contexts: tuple[ForwardContext, ...]  #: of the wrappers around the model
    strict: bool = False  #: check the arguments of the layers

    @contextmanager
    def grow(self, members: int) -> Iterator[None]:
        """Let the model grow from one row per sequence to one per member while it runs within the block.

        Raises:
            WrapError: If ``strict``, and a layer gets an argument that may have rows and is not known, or a known one
                of another kind.
        """
        thread = threading.get_ident()  # another thread may run the same model
        grown: dict[int, tuple[Tensor, Tensor]] = {}  # what is handed to several layers grows once
        batch = 0

        def repeat(x: Any) -> Any:
            if isinstance(x, Tensor):
                if not x.ndim or len(x) != batch:
                    return x
                if id(x) not in grown:
                    copies = x.expand(members, *x.shape[1:]) if batch == 1 else expand(x, members)
                    grown[id(x)] = x, copies
                return grown[id(x)][1]
            if isinstance(x, Mapping):
                return {name: repeat(item) for name, item in x.items()}
            return tuple(repeat(item) for item in x) if isinstance(x, (tuple, list)) else x

        def hook(place: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
            names = self.names[place]

            def grow_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                nonlocal batch
                if threading.get_ident() != thread:
                    return None
                if not place:
                    batch = len(args[0] if args else kwargs["hidden_states"])
                    for context in self.contexts:
                        context.rows = members * batch
                if self.strict:
                    _check_inputs(dict(zip(names, args, strict=False)) | kwargs, batch, is_first=not place)
                # Above the fork hidden states have grown already.
                known = _GROWS.keys() - {"hidden_states"} if place else _GROWS.keys()
                first = [repeat(x) if name in known else x for name, x in zip(names, args, strict=False)]
                named = {name: repeat(x) if name in known else x for name, x in kwargs.items()}
                return (*first, *args[len(first) :]), named

            return grow_inputs

        handles = [
            layer.register_forward_pre_hook(hook(place), with_kwargs=True) for place, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_inputs(inputs: Mapping[str, Any], batch: int, *, is_first: bool) -> None:
    """Check that all rows among a layer's inputs are known.

    Raises:
        WrapError: If there may be others.
    """

    def list_leaves(x: Any) -> Iterator[Any]:
        items = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else None
        if items is None:
            yield x
        else:
            for item in items:
                yield from list_leaves(item)

    for name, value in inputs.items():
        if name == "hidden_states" and not is_first:
            continue
        for x in list_leaves(value):
            if name in _GROWS:
                is_fit = x is None or (isinstance(x, Tensor) and x.ndim in _GROWS[name] and len(x) in (1, batch))
            else:
                is_fit = not isinstance(x, Tensor) or x.ndim < 2 or len(x) != batch
            if not is_fit:
                shape = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"of type {type(x).__name__}"
                raise WrapError(f"its layers get {name} {shape}")


@runtime_checkable
class Steps(Protocol):
    """The steps of a model, as far as a check takes them; see ``stepper.Stepper``."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Any]]:
        """Read prompts."""

    def step(self, ids: Tensor) -> Any:
        """Append one token to every sequence."""


_FORKS: WeakKeyDictionary[nn.Module, tuple[int, LateFork | None]] = WeakKeyDictionary()


def find_late_fork(model: nn.Module, build: Callable[[LateFork | None], Steps]) -> LateFork | None:
    """Return the late fork of a model; None where there is none to be had. The result is kept.

    Args:
        model: The model, wrapped or not.
        build: Builds a stepper of the model with this fork, or with the full one.
    """
    members = count_rows(model)
    if not isinstance(model, Wrapped) or members == 1 or model.spec.compile:
        return None
    known = _FORKS.get(model)
    if known is not None and known[0] == members:
        return known[1]
    _FORKS[model] = members, None  # also while it is checked
    try:
        fork = _build(model)
        if fork is not None:
            _check(fork, build, int(innermost(model).config.get_text_config().vocab_size))  # type: ignore[union-attr, operator]
    except Exception as error:  # whatever a model does with other rows than it expects: the full fork is right
        fork = None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"all {members} members run from the first layer on, which is right and slower: the layers below the first "
            f"changed one cannot run once for all members of {type(innermost(model)).__name__} ({reason})",
            SlowWarning,
            stacklevel=2,
        )
    _FORKS[model] = members, fork
    return fork


def _build(model: Wrapped) -> LateFork | None:
    """Return a late fork that is not checked yet; None where the first layer has members.

    Raises:
        ConfigError: If the model has no stack of layers.
    """
    base = innermost(model)
    leaves = [model.module.get_submodule(name) for name in model.leaf_names]
    stack = find_decoder_layers(base)
    places = {id(module): place for place, layer in enumerate(stack) for module in layer.modules()}
    head = get_output_head(base)
    after = set() if head is None else {id(module) for module in head.modules()}
    first = min(places.get(id(leaf), len(stack) if id(leaf) in after else -1) for leaf in leaves)
    if first <= 0:
        return None
    first = min(first, len(stack) - 1)
    layers = tuple(stack)[first:]
    names = tuple(tuple(inspect.signature(layer.forward).parameters) for layer in layers)
    contexts, inside = [], model
    while isinstance(inside, Wrapped):
        contexts.append(inside.call)
        inside = inside.module  # type: ignore[assignment]
    return LateFork(first, layers, names, tuple(contexts))


@torch.inference_mode()
def _check(fork: LateFork, build: Callable[[LateFork | None], Steps], vocabulary: int) -> None:
    """Check that a late fork gives the logits of the full one, for prompts of two lengths and a step after them.

    Raises:
        ConfigError: If it does not.
    """
    ids = torch.randint(vocabulary, (14,), generator=torch.Generator().manual_seed(0))

    def compute_logits(stepper: Steps) -> Tensor:
        pieces = [piece.logits for _, piece in stepper.start([ids[:7].tolist(), ids[7:12].tolist()])]
        pieces.append(stepper.step(ids[12:].to(pieces[0].device)).logits[:, :, None])
        members = len(pieces[-1])
        whole = torch.cat([expand(x, members) if len(x) < members else x for x in pieces], 2)
        # In front of the shorter prompt stands padding, on which anything may be computed.
        return torch.cat([whole[:, 0], whole[:, 1, 2:]], 1)

    full, late = compute_logits(build(None)), compute_logits(build(replace(fork, strict=True)))
    tolerance = TOLERANCES.get(full.dtype, TOLERANCE)
    full, late = full.double(), late.double()
    finite = full.isfinite()
    if not finite.any() or not torch.equal(finite, late.isfinite()):
        raise ConfigError("its logits are not finite, or not in the same places")
    difference = float((full - late)[finite].abs().max() / full[finite].abs().max().clamp_min(1e-9))
    if difference > tolerance:
        raise ConfigError(f"logits differ by {difference:.1e} of the largest one, more than {tolerance}")
