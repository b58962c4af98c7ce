"""Finds the leaves that a wrapper replaces, by a regex over full parameter names.

A leaf is the smallest module that owns a matched parameter, usually an ``nn.Linear``. Three kinds of module are one
leaf as a whole, since replacing a part of them would be ignored or wrong: adapter layers around a base layer (PEFT),
parametrised modules, and ``nn.MultiheadAttention``, which reads its projection's weight without calling it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from selfdoubt.compat import get_base_layer, get_output_head, has_output_head, is_adapter_layer, is_transposed
from selfdoubt.errors import ConfigError, TargetError, WrapError
from selfdoubt.rows import Replacement, list_added_names

#: Query and value projections, under the names that decoder families give them (some fuse them into one).
DECODER_FILTER = r"\.(q_proj|v_proj|qkv_proj|c_attn|query_key_value|Wqkv)\."
EVERYTHING = r".*"


@dataclass(frozen=True)
class Leaf:
    """A module to replace and the names, relative to it, of its matched parameters."""

    name: str
    module: nn.Module
    params: tuple[str, ...]


def find_leaves(model: nn.Module, param_filter: str | None) -> list[Leaf]:
    """Find the leaves whose parameters match, in the model's own order.

    Args:
        model: Any module.
        param_filter: A regex, searched in full parameter names such as ``layers.0.q_proj.weight``. None means the
            query and value projections of a decoder, and every parameter of any other model.

    Raises:
        ConfigError: If the regex cannot be parsed.
        TargetError: If nothing matches; names the nearest parameters.
    """
    pattern = choose_default_filter(model) if param_filter is None else param_filter
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"param_filter must be a regular expression, got {pattern!r}: {error}") from None
    modules = dict(model.named_modules())
    matched: dict[str, list[str]] = {}
    # Tied parameters keep all their names: the filter picks by name, so each owner can be a leaf of its own.
    for full_name, _ in model.named_parameters(remove_duplicate=False):
        if regex.search(full_name):
            leaf = _owner(modules, full_name)
            matched.setdefault(leaf, []).append(full_name[len(leaf) + 1 if leaf else 0 :])
    if not matched:
        raise TargetError(_nothing_matches(model, pattern))
    if "" in matched:
        raise TargetError(
            f"param_filter={pattern!r} matches {matched[''][0]!r}, which belongs to the model itself; "
            "put the model inside another module, e.g. nn.Sequential(model), or narrow the filter"
        )
    return [Leaf(name, modules[name], tuple(params)) for name, params in matched.items()]


def find_heads(model: nn.Module) -> list[Leaf]:
    """Find the output embeddings of a language model, or the last linear or convolution layer of any other model.

    Layers that an inner wrapper added are none.

    Raises:
        WrapError: If there is no such layer.
    """
    added = set(list_added_names(model))
    leaves = [leaf for leaf in find_leaves(model, EVERYTHING) if f"{leaf.name}.{leaf.params[0]}" not in added]
    heads = [leaf for leaf in leaves if is_head(leaf)]
    outputs = {id(_get_leaf(get_output_head(m))) for m in model.modules() if has_output_head(m)}
    chosen = [leaf for leaf in heads if id(leaf.module) in outputs] or heads[-1:]
    if not chosen:
        raise WrapError("no linear or convolution layer to serve as a head; name one with param_filter")
    return chosen


def find_features(model: nn.Module) -> list[Leaf]:
    """Find the heads, or the linear layer right before the only one in the same module; the first layer never is.

    Raises:
        WrapError: If there is no head.
    """
    heads = find_heads(model)
    if len(heads) != 1:
        return heads
    leaves = find_leaves(model, EVERYTHING)
    place = next(i for i, leaf in enumerate(leaves) if leaf.name == heads[0].name)
    before = leaves[place - 1] if place > 1 else heads[0]
    is_beside = before.name.rpartition(".")[0] == heads[0].name.replace(".leaf", "").rpartition(".")[0]
    are_linear = all(isinstance(get_base_layer(leaf.module), nn.Linear) for leaf in (before, heads[0]))
    return [before] if is_beside and are_linear else heads


def find_inner_leaves(model: nn.Module, param_filter: str | None) -> list[Leaf]:
    """Find the leaves that take noise: as ``find_leaves``, but by default, in any model but a decoder without the
    first, norms, embeddings and attention modules, where noise makes samples disagree about everything.

    Where there are no others, these are the leaves.
    """
    leaves = find_leaves(model, param_filter)
    if param_filter is not None or choose_default_filter(model) != EVERYTHING:
        return leaves

    def is_sensitive(layer: nn.Module) -> bool:
        kinds = (nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)
        return isinstance(layer, kinds) or "Norm" in type(layer).__name__

    return [leaf for leaf in leaves[1:] if not is_sensitive(get_base_layer(leaf.module))] or leaves


def is_head(leaf: Leaf) -> bool:
    """Return True for a linear or convolution layer, also within an adapter layer."""
    base = get_base_layer(leaf.module)
    return isinstance(base, (nn.Linear, nn.Conv1d, nn.Conv2d)) or is_transposed(base)


def find_input_width(leaf: Leaf) -> tuple[int, int]:
    """Return the width of a layer's input, and its axis.

    Raises:
        WrapError: If the kind of layer does not say.
    """
    module = leaf.module
    while isinstance(module, Replacement):
        module = module.leaf
    base: Any = get_base_layer(module)
    if is_transposed(base):
        return int(base.weight.shape[0]), -1
    if isinstance(base, nn.Linear):
        return base.in_features, -1
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return base.in_channels, 1
    weight = getattr(base, "weight", None)
    if (
        "Norm" in type(base).__name__
        and not isinstance(base, _BatchNorm)
        and isinstance(weight, Tensor)
        and weight.ndim == 1
    ):
        return len(weight), -1
    raise WrapError(
        "only the input of a linear or convolution layer, or of a norm over the last axis, can be measured, and "
        f"{leaf.name} is {type(base).__name__}; name another with param_filter"
    )


def join_nested_leaves(leaves: list[Leaf]) -> list[Leaf]:
    """Merge leaves that lie inside other leaves into these, in the model's order."""
    joined: dict[str, Leaf] = {}
    for leaf in leaves:
        outer = next((name for name in joined if leaf.name.startswith(f"{name}.")), None)
        if outer is None:
            joined[leaf.name] = leaf
        else:
            inside = tuple(f"{leaf.name[len(outer) + 1 :]}.{param}" for param in leaf.params)
            joined[outer] = replace_fields(joined[outer], params=joined[outer].params + inside)
    return list(joined.values())


def choose_default_filter(model: nn.Module) -> str:
    """Return the filter for None: query and value projections of a decoder, every parameter of any other model."""
    is_decoder = any(has_output_head(m) for m in model.modules())
    names = (name for name, _ in model.named_parameters())
    return DECODER_FILTER if is_decoder and any(re.search(DECODER_FILTER, n) for n in names) else EVERYTHING


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule of this name by ``new``, in place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _get_leaf(module: nn.Module | None) -> nn.Module | None:
    """Return the layer that an inner wrapper has replaced, or the module itself."""
    return _get_leaf(module.leaf) if isinstance(module, Replacement) else module


def _owner(modules: dict[str, nn.Module], full_name: str) -> str:
    """Return the leaf that owns a parameter: its module, or the outermost module that must stay whole."""
    path = full_name.rpartition(".")[0]
    steps = path.split(".")
    for end in range(1, len(steps)):
        ancestor = ".".join(steps[:end])
        if _is_whole(modules[ancestor]):
            return ancestor
    return path


def _is_whole(module: nn.Module) -> bool:
    return is_adapter_layer(module) or is_parametrized(module) or isinstance(module, nn.MultiheadAttention)


def _nothing_matches(model: nn.Module, pattern: str) -> str:
    names = [name for name, _ in model.named_parameters()]
    if not names:
        return f"param_filter={pattern!r} matches nothing: the model has no parameters"

    def similarity(name: str) -> float:
        pieces = [name, *name.split(".")]
        words = [w for w in re.split(r"[|().*+?^$\\]+", pattern) if w] or [pattern]
        return max(SequenceMatcher(None, w, p).ratio() for w in words for p in pieces)

    nearest = sorted(names, key=similarity, reverse=True)[:3]
    return (
        f"param_filter={pattern!r} matches none of the {len(names)} parameters; "
        f"the nearest are {', '.join(nearest)}; try param_filter={nearest[0].split('.')[-2]!r}"
        if "." in nearest[0]
        else f"param_filter={pattern!r} matches none of the {len(names)} parameters; the nearest: {nearest[0]}"
    )
