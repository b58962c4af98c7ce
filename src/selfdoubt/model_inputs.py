"""Names a model's inputs, and finds the batch among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from selfdoubt.errors import ConfigError, DataError, ShapeError
from selfdoubt.rows import ForwardContext, is_list_of_ids, leave_out
from selfdoubt.tree import iter_tensors, tree_map

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class InputNames:
    """The names of a model's inputs, as its ``forward`` has them."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...] = ()
    required: int = 0  #: number of positional inputs without a default
    is_open: bool = False  #: True if it takes further positional inputs, ``*args``
    has_any_name: bool = False  #: True if it takes further keyword inputs, ``**kwargs``

    @classmethod
    def read(cls, model: nn.Module) -> InputNames:
        """Read the signature of a model, of PEFT's that of the model inside."""
        get_inside = getattr(model, "get_base_model", None)
        inside = get_inside() if callable(get_inside) else model
        parameters = inspect.signature(inside.forward).parameters.values()
        keywords = (p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        return cls(
            tuple(p.name for p in positional), tuple(keywords),
            required=sum(p.default is inspect.Parameter.empty for p in positional),
            is_open=any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters),
            has_any_name=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
        )  # fmt: skip

    def match(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Return positional inputs by name; those of ``*args`` are called ``*0``, ``*1``, ..."""
        names = self.positional
        return dict(zip((*names[: len(args)], *(f"*{i}" for i in range(len(names), len(args)))), args, strict=True))


def find_batch_size(inputs: Mapping[str, Any], shared: tuple[str, ...], names: InputNames) -> int:
    """Return the length of the first input tensor: dimension 0 is the batch.

    Args:
        inputs: The inputs of a call, by name.
        shared: Names of inputs without a batch axis.
        names: Names of the inputs that the model knows.

    Raises:
        ConfigError: If a shared input is not one of the model's.
        ShapeError: If no input has a batch axis.
    """
    known = (inputs, names.positional, names.keyword_only)
    unknown = [name for name in shared if not any(name in some for some in known)]
    if unknown:
        raise ConfigError(f"shared_inputs names {unknown}, and the inputs are {list(inputs)}")
    batched = {name: value for name, value in inputs.items() if name not in shared}
    first = next((tensor for tensor in iter_tensors(list(batched.values())) if tensor.ndim), None)
    if first is None:
        given = ", ".join(f"{name}: {type(value).__name__}" for name, value in batched.items()) or "none"
        is_array = any(hasattr(value, "__array__") and not isinstance(value, Tensor) for value in batched.values())
        repair = "; convert arrays by torch.from_numpy(x)" if is_array else ""
        raise ShapeError(f"a wrapped model needs at least one input tensor with a batch axis, got {given}{repair}")
    return len(first)


def map_batch(
    function: Callable[[Tensor], Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: InputNames,
    shared: tuple[str, ...],
    batch: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs of a call with a function of each tensor that has the batch axis.

    Args:
        function: The function.
        args: Positional inputs.
        kwargs: Keyword inputs.
        names: Names of the inputs that the model knows.
        shared: Names of inputs without a batch axis.
        batch: Size of the batch.
    """

    def change(x: Any) -> Any:
        return function(x) if isinstance(x, Tensor) and x.ndim and len(x) == batch else x

    positional = names.match(args).items()
    return (
        tuple(value if name in shared else tree_map(change, value) for name, value in positional),
        {name: value if name in shared else tree_map(change, value) for name, value in kwargs.items()},
    )


def split_inputs(batch: Any, names: InputNames) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch of a loader as positional and keyword inputs.

    Args:
        batch: A tensor, a tuple or list of the inputs that the model requires, or a mapping of inputs by name.
        names: Names of the inputs that the model knows.

    Raises:
        DataError: If there are more inputs than the model requires: the last may be labels.
    """
    if isinstance(batch, Mapping):
        known = {*names.positional, *names.keyword_only}
        unknown = [] if names.has_any_name else [name for name in batch if name not in known]
        missing = [name for name in names.positional[: names.required] if name not in batch]
        if unknown or missing:
            wrong = f"{unknown[0]!r}, which the model does not know" if unknown else f"no {missing[0]!r}"
            raise DataError(
                f"a batch has {wrong}; the model's inputs are {', '.join((*names.positional, *names.keyword_only))}"
            )
        return (), dict(batch)
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    required = max(names.required, 1)
    if names.is_open and len(batch) > 1 and isinstance(batch[-1], Tensor) and is_list_of_ids(batch[-1]):
        raise DataError(
            f"a batch has {len(batch)} entries, and the last looks like labels, {len(batch[-1])} whole numbers; leave "
            "them out, or name the inputs in a dict"
        )
    if len(batch) > required and not names.is_open:
        used = names.positional[:required]
        entries = ", ".join(f"{name!r}: batch[{i}]" for i, name in enumerate(used))
        raise DataError(
            f"a batch has {len(batch)} entries, and the model requires {required} ({', '.join(used)}); "
            f"leave labels out, and name other inputs: ({{{entries}}} for batch in loader)"
        )
    return tuple(batch), {}


def read_batches(loader: Any, names: InputNames) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the batches of a loader as positional and keyword inputs; see ``split_inputs``.

    Raises:
        DataError: If it is none, if it gives no batches, or if a batch does not fit the model.
    """
    if isinstance(loader, (Tensor, Mapping, str)) or not hasattr(loader, "__iter__"):
        repair = "; give a list of batches, e.g. [x]" if isinstance(loader, (Tensor, Mapping)) else ""
        raise DataError(f"batches must be a list of inputs or a DataLoader, got {type(loader).__name__}{repair}")
    batch = None
    for batch in loader:
        yield split_inputs(batch, names)
    if batch is None:
        raise DataError("the loader gave no batches; a generator can be read once: give a list or a DataLoader")


@contextmanager
def explain_rows(inputs: Any, members: int, contexts: Sequence[ForwardContext]) -> Iterator[None]:
    """Add to an error of the model that its inputs were repeated, or split, for the members.

    Args:
        inputs: The inputs of all rows.
        members: Number of members.
        contexts: State of the run, of each wrapper.
    """
    if torch.compiler.is_compiling() or members == 1:
        yield
        return
    try:
        yield
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in iter_tensors(inputs))
        error.add_note(
            f"selfdoubt ran {members} members as rows of dimension 0, with inputs of shape {shapes}: if dimension 0 of "
            "yours is not the batch, give one, e.g. x[None] for one row"
        )
        name = next((context.many_lines for context in contexts if context.many_lines), None)
        if name is not None:
            error.add_note(
                f"{name} got several lines for each row: if it sees something else than rows, it cannot have members; "
                f"leave it out, e.g. with {leave_out(name)}"
            )
        raise


def check_batch(inputs: Mapping[str, Any], shared: tuple[str, ...], batch: int) -> None:
    """Check that a batch can be repeated for members, or split over them.

    Raises:
        ShapeError: If an input numbers rows of the batch, or packs them.
    """
    for name, value in inputs.items():
        if name in shared:
            continue
        if isinstance(value, PackedSequence):
            raise ShapeError(
                f"the input {name} is a packed sequence, which has no batch axis; give the padded batch and its "
                "lengths to the model, and pack inside of it with enforce_sorted=False"
            )
        if isinstance(value, Tensor) and _is_edge_list(value, batch):
            raise ShapeError(
                f"the input {name} has shape {tuple(value.shape)} and looks like a list of edges, which number the "
                f"nodes of one graph; with nodes in dimension 1, (batch, nodes, features), use "
                f"shared_inputs=({name!r},); nodes of several graphs in one line have no batch axis: see Graphs in "
                "docs/gotchas.md"
            )


def _is_edge_list(x: Tensor, batch: int) -> bool:
    is_integer = not (x.is_floating_point() or x.is_complex()) and x.element_size() > 1
    return is_integer and x.ndim == 2 and len(x) == 2 and batch != 2
