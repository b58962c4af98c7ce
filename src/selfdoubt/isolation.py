"""``IsolationCheck``: a test that shows whether the members of a wrapped model are rows of their own.

A layer may read something else than rows, such as learned latents or a table of relative positions. Where the length of
that is a multiple of the rows, its lines would be shared out among the members, and nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import Enum
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from selfdoubt.errors import WrapError
from selfdoubt.rows import ForwardContext, Replacement, leave_out, unfold
from selfdoubt.sharing import share_module
from selfdoubt.tree import iter_tensors, tree_map

#: Largest change of other members' answers, relative to the largest answer. All runs have the same shapes, so that only
#: kernels that look at the whole batch round other rows in another way: with 16 bits, and with weights of fewer.
_TOLERANCE, _HALF, _PACKED = 1e-5, 5e-3, 2e-2
#: Largest difference between the answers to the same rows in other places of a batch, relative to the largest answer.
_PLACES, _PLACES_HALF = 1e-3, 0.1
#: Number of kinds of call that are all tested; after them, only those that could mix members.
_TESTED = 16
_REMEMBERED = 4096
#: Numbers in buffers up to which a twin has its own; with more there is no test.
_COPIED = 2**26
_NAMED = 4  #: layers that an error names
_PLAIN = (
    Tensor, bool, int, float, complex, str, bytes, type(None), Enum, slice, range, torch.dtype, torch.device,
    FunctionType, BuiltinFunctionType,
)  # fmt: skip

_get_hooks = attrgetter("_forward_hooks")
#: Runs a model on the rows of all members: with ``only_base=True`` by the weights of the base model alone.
RunTwin = Callable[..., Any]


class IsolationCheck:
    """Tests once per kind of call whether a change of the first member's layers changes other members' answers.

    A test costs one more call of a twin that shares the weights, more where that call is not repeated to the bit. It
    says nothing where a model is compiled, run by several processes, or not reproducible.
    """

    def __init__(self) -> None:
        self._rows: set[int] = set()
        self._calls: set[tuple[Any, ...]] = set()

    def is_due(self, contexts: Sequence[ForwardContext], inputs: Any) -> bool:
        """Return True if a call was of a kind that is to be tested, and note it.

        Args:
            contexts: State of the call, of each wrapper that has members.
            inputs: The model's inputs, before they were repeated.
        """
        if torch.compiler.is_compiling() or not contexts or contexts[0].members == 1:
            return False
        rows, kind = contexts[0].rows, (contexts[0].training, *_describe(inputs))
        if (rows, kind) in self._calls or not _can_run_again(inputs):
            return False
        has_length = any(rows in shape[1:] for shape in kind if isinstance(shape, torch.Size))
        could_mix = has_length or any(context.many_lines for context in contexts)
        is_due = could_mix or rows not in self._rows or len(self._calls) < _TESTED
        if len(self._calls) == _REMEMBERED:
            self._calls.clear()
        self._rows.add(rows)
        self._calls.add((rows, kind))
        return is_due


def check_isolation(wrapped: nn.Module, context: ForwardContext, answers: Any, run: RunTwin, *, has_time: bool) -> None:
    """Run the test.

    Args:
        wrapped: The model, which stays as it is.
        context: State of its call.
        answers: What it returned, on the rows of all members.
        run: Runs a twin of it on the same inputs.
        has_time: True if all members read the same inputs, and layers could read the rows as time.

    Raises:
        WrapError: If members are mixed.
    """
    members, rows = context.members, context.rows
    devices = sorted({x.device.index for x in iter_tensors(answers) if x.is_cuda})
    odd: set[str] = set()  # layers that read something else than rows

    def answer(names: Collection[str] = (), seed: int | None = None, **how: Any) -> Any:
        """Return a twin's answers with some layers disturbed; None where it cannot run."""
        twin = _make_twin(wrapped)
        if twin is None:
            return None
        layers = _find_layers(twin)
        for name in names:
            layers[name].register_forward_hook(_Disturbance(members, rows, odd), with_kwargs=True)
        try:
            with torch.random.fork_rng(devices):  # so all runs draw the same numbers
                if seed is not None:
                    torch.manual_seed(seed)
                return run(twin, **how)
        except Exception:  # what a disturbed layer gives, no call would give
            return None

    every = list(_find_layers(wrapped))
    disturbed, tolerance = answer(every), _choose_tolerance(wrapped)
    try:
        is_suspicious = disturbed is not None and _compare(answers, disturbed, members, rows) > tolerance
    except RuntimeError:  # in a transform of torch.func tensors have no values to compare
        return
    if is_suspicious:
        before, again = answer(), answer()  # the call drew other numbers, or began with another state
        if before is None or again is None:
            return
        tolerance = max(tolerance, 10 * _compare(before, again, members, rows))
        if _compare(before, disturbed, members, rows) > tolerance:
            guilty: list[str] = []
            for name in every:
                one = answer([name]) if len(guilty) <= _NAMED else None
                if one is not None and _compare(before, one, members, rows) > tolerance:
                    guilty.append(name)
            raise WrapError(_explain(guilty, odd))
    if has_time:
        neutral, other = answer(only_base=True), answer(only_base=True, seed=0)
        is_random = neutral is None or _compare(neutral, other, 1, rows) > 0
        if not is_random and _compare_places(neutral, members, rows) > (_PLACES if tolerance < _HALF else _PLACES_HALF):
            raise WrapError(
                "the model mixes the rows of a batch, so that members would be mixed: the same row has another answer "
                "in another place of the batch; does a recurrent or attention layer read dimension 0 as time?"
            )


def _explain(guilty: Sequence[str], odd: Collection[str]) -> str:
    """Return the message about layers whose disturbance reaches other members."""
    blind = [name for name in guilty if name in odd]
    chosen = blind or list(guilty)
    names = ", ".join(chosen[:_NAMED]) + (" and others" if len(chosen) > _NAMED else "")
    one = len(chosen) == 1
    where = f"{names or 'a layer'} read{'s' if one else ''} something else than rows"
    where += "" if blind else ", or what follows mixes the rows of a batch"
    repair = f"e.g. with {leave_out(*chosen)}" if 0 < len(chosen) <= _NAMED else "with param_filter"
    return (
        f"{where}, so that members would be mixed; leave {'it' if one else 'them'} out, {repair} "
        "(wrapped.tests_members = False skips this test)"
    )


def _find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the replaced layers that members change, by the names that a filter reads."""
    layers = (m for m in model.modules() if isinstance(m, Replacement))
    return {m.leaf_name: m for m in layers if m.leaf_name}


def _make_twin(model: nn.Module) -> nn.Module | None:
    """Return a model over the same weights, with buffers of its own; None for one that cannot be copied."""
    buffers = list(model.buffers())
    if sum(buffer.numel() for buffer in buffers) > _COPIED:
        return None
    # Tensors of the last call that a model keeps have a graph, and cannot be copied.
    kept = [x for m in model.modules() for x in iter_tensors(list(vars(m).values())) if x.grad_fn is not None]
    try:
        twin = share_module(model, freeze=False, copies={id(x): x.detach().clone() for x in (*buffers, *kept)})
    except WrapError:
        return None
    for module in twin.modules():
        if not isinstance(module, Replacement):
            _get_hooks(module).clear()  # they read what layers return
    return twin


def _choose_tolerance(model: nn.Module) -> float:
    """Return the largest change of an answer that is rounding, relative to the largest answer."""
    parameters = list(model.parameters())
    if any("quant" in type(m).__module__ for m in model.modules()) or any(p.element_size() < 2 for p in parameters):
        return _PACKED
    is_autocasting = any(torch.is_autocast_enabled(kind) for kind in {p.device.type for p in parameters} - {"meta"})
    return _HALF if is_autocasting or any(p.element_size() < 4 for p in parameters) else _TOLERANCE


class _Disturbance:
    """A forward hook that adds a pattern to the first member's rows of what a layer returns."""

    def __init__(self, members: int, rows: int, odd: set[str]) -> None:
        self.members, self.rows, self.odd = members, rows, odd

    def __call__(self, leaf: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = next(iter_tensors((args, kwargs)), None)
        if x is None or x.ndim < 2 or len(x) != self.rows:
            self.odd.add(leaf.leaf_name)
        while isinstance(leaf, Replacement):
            leaf = leaf.leaf
        if isinstance(output, tuple) and isinstance(leaf, nn.RNNBase):  # its last states have rows in dimension 1
            return tree_map(lambda y: self._change(y, 0), output[0]), tree_map(lambda h: self._change(h, 1), output[1])
        return tree_map(lambda y: self._change(y, 0), output)

    def _change(self, x: Any, axis: int) -> Any:
        if not isinstance(x, Tensor) or x.ndim <= axis or not (x.is_floating_point() or x.is_complex()):
            return x
        if not x.shape[axis] or x.shape[axis] % self.rows:
            return x
        lines = x.shape[axis] // self.members
        first, kept = x.narrow(axis, 0, lines), x.narrow(axis, lines, x.shape[axis] - lines)
        wide = first.detach().abs().float()
        size = wide.square().mean().sqrt().nan_to_num(1, 1, 1)
        pattern = torch.arange(wide.numel(), device=x.device).cos().view(wide.shape)  # nothing is shifted as a whole
        return torch.cat([first + (torch.where(size > 0, size, 1) * pattern / 4).to(x.dtype), kept], axis)


def _compare(before: Any, after: Any, members: int, rows: int) -> float:
    """Return the largest change of an answer of other members than the first, relative to the largest answer.

    Of one member all answers count.
    """
    xs, ys = list(iter_tensors(before)), list(iter_tensors(after))
    if len(xs) != len(ys):
        return 1.0
    first = rows // members if members > 1 else 0
    alike = [(x, y) for x, y in zip(xs, ys, strict=True) if _has_rows(x, rows) and x.shape == y.shape]
    return max((_measure(x[first:], y[first:], x) for x, y in alike), default=0.0)


def _compare_places(answers: Any, members: int, rows: int) -> float:
    """Return the largest difference between the members' answers, which are all the base model's."""
    floats = [x for x in iter_tensors(answers) if _has_rows(x, rows) and x.is_floating_point()]
    blocks = [unfold(x, members) for x in floats]
    return max((_measure(x[:1].expand_as(x), x, x) for x in blocks), default=0.0)


def _has_rows(x: Tensor, rows: int) -> bool:
    return x.ndim > 0 and len(x) == rows and x.numel() > 0


def _measure(x: Tensor, y: Tensor, all_of_x: Tensor) -> float:
    """Return the largest difference, relative to the largest finite number of a tensor; NaN is like NaN."""
    x, y, all_of_x = (
        torch.view_as_real(t) if t.is_complex() else t for t in (x.detach(), y.detach(), all_of_x.detach())
    )
    wide = torch.float64 if x.dtype == torch.float64 or not x.is_floating_point() else torch.float32
    is_equal = (x == y) | (x.isnan() & y.isnan())
    difference = (x.to(wide) - y.to(wide)).abs().nan_to_num(float("inf")).masked_fill(is_equal, 0)
    largest = float(all_of_x.to(wide).abs().nan_to_num(0, 0, 0).max())
    return float(difference.max()) / (largest or 1.0)


def _describe(inputs: Any) -> tuple[Any, ...]:
    """Return the shapes of all tensors, and the flags among the inputs."""
    kinds: list[Any] = []
    tree_map(
        lambda x: kinds.append(
            x.shape if isinstance(x, Tensor) else x if isinstance(x, (bool, str, Enum)) else type(x)
        ),
        inputs,
    )
    return tuple(kinds)


def _can_run_again(inputs: Any) -> bool:
    """Return True if a call can be repeated: inputs of other kinds, such as key-value caches, may have changed."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return False  # processes that do not all repeat it would wait for each other
    leaves: list[Any] = []
    tree_map(leaves.append, inputs)
    if any(isinstance(x, Tensor) and x.is_cuda for x in leaves) and torch.cuda.is_current_stream_capturing():
        return False
    return all(isinstance(x, _PLAIN) and not (isinstance(x, Tensor) and x.is_meta) for x in leaves)
