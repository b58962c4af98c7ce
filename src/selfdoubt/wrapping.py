"""Wraps models and classes of models, and finds what is inside of wrapped ones."""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

from torch import nn

from selfdoubt.errors import WrapError
from selfdoubt.members import Wrapped
from selfdoubt.rows import Replacement
from selfdoubt.spec import Spec
from selfdoubt.targets import Leaf


def wrap(spec: Spec, model: Any) -> Any:
    """Wrap a model; or, used as a decorator, make a class build wrapped models.

    Raises:
        WrapError: If it is neither an ``nn.Module`` nor a class of them.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):

        def build(*args: Any, **kwargs: Any) -> Wrapped:
            return Wrapped(model(*args, **kwargs), spec)

        return update_wrapper(build, model, updated=())
    if not isinstance(model, nn.Module):
        raise WrapError(f"only an nn.Module, or a class of them, can be wrapped, got {type(model).__name__}")
    return Wrapped(model, spec)


def innermost(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers, with its replaced leaves; a plain model itself."""
    return innermost(model.module) if isinstance(model, Wrapped) else model


def get_source(model: nn.Module) -> str | None:
    """Return the folder, file or hub name of a Hugging Face model, as its config has it; None where it has none."""
    return getattr(getattr(innermost(model), "config", None), "name_or_path", None) or None


def get_base_name(model: nn.Module, name: str) -> str:
    """Return the name that a module or parameter of a wrapped model has in the model that was wrapped."""
    kept: list[str] = []
    module: Any = model
    for part in name.split("."):
        ours = {Wrapped: "module", Replacement: "leaf"}
        if not any(isinstance(module, kind) and part == inside for kind, inside in ours.items()):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def lift_leaf(leaf: Leaf, model: nn.Module) -> Leaf:
    """Return the replacement of a leaf in place of the leaf, where the wrapper it belongs to lies outside of the model.

    So the order of replacements is that of the wrappers.
    """
    inside = {id(m.call) for m in model.modules() if isinstance(m, Wrapped)}
    name, _, child = leaf.name.rpartition(".")
    outer = model.get_submodule(name)
    if child != "leaf" or not isinstance(outer, Replacement) or id(outer.call) in inside:
        return leaf
    return lift_leaf(Leaf(name, outer, tuple(f"leaf.{param}" for param in leaf.params)), model)
