"""``IsolationCheck``: a test run that shows whether the members of a wrapped model are rows of their own.

A layer may read something else than rows, such as learned latents or a table of relative positions. Where the length of
that is a multiple of the rows, its lines would be shared out among the members, and nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from selfdoubt.errors import WrapError
from selfdoubt.rows import ForwardContext, Replacement, leave_out
from selfdoubt.sharing import share_module
from selfdoubt.tree import iter_tensors, tree_map

#: Largest change of other members' answers, relative to that of the disturbed member's: with full precision, and with
#: less, as kernels that look at the whole batch may round each row in another way.
_TOLERANCE, _ROUNDED = 1e-4, 0.05
#: Number of shapes that are all tested; after them, only those that could mix members.
_TESTED = 16
_REMEMBERED = 4096
#: Size up to which a buffer is copied, since a model may write to it.
_SMALL = 2**20

Change = Callable[[Tensor], Tensor]
_get_hooks = attrgetter("_forward_hooks")


class IsolationCheck:
    """Tests once per shape of the inputs whether a change of the first member's rows changes others.

    A test costs one more call, without gradients, of a twin that shares the weights, so that it leaves no trace. It
    disturbs the first member's inputs and what replaced layers return for it. It says nothing where a model is
    compiled, run by several processes, or not reproducible.
    """

    def __init__(self) -> None:
        self._rows: set[int] = set()
        self._shapes: set[tuple[Any, ...]] = set()

    def is_due(self, contexts: Sequence[ForwardContext], inputs: Any) -> bool:
        """Return True if a call was of shapes that are to be tested, and note them.

        Args:
            contexts: State of the call, of each wrapper that has members.
            inputs: The model's inputs, before they were repeated.
        """
        if torch.compiler.is_compiling() or not contexts or contexts[0].members == 1:
            return False
        rows, shapes = contexts[0].rows, tuple(tuple(x.shape) for x in iter_tensors(inputs))
        if (rows, shapes) in self._shapes or not _can_run_again(inputs):
            return False
        could_mix = any(context.many_lines for context in contexts) or any(rows in shape[1:] for shape in shapes)
        is_due = could_mix or rows not in self._rows or len(self._shapes) < _TESTED
        if len(self._shapes) == _REMEMBERED:
            self._shapes.clear()
        self._rows.add(rows)
        self._shapes.add((rows, shapes))
        return is_due


@torch.no_grad()
def check_isolation(
    twin: nn.Module, layers: Mapping[str, nn.Module], members: int, answers: Any, run: Callable[[Change], Any]
) -> None:
    """Run the test.

    Args:
        twin: The model from ``make_twin``.
        layers: The replaced layers of the twin that members change, by their names in the model.
        members: Number of members, with the base model.
        answers: What the model returned, on the rows of all members.
        run: Runs the twin on the same inputs, each of which a function changes first.

    Raises:
        WrapError: If members are mixed.
    """
    disturbance, tolerance = _Disturbance(members), _ROUNDED if _is_rounded(twin) else _TOLERANCE

    def measure(names: Iterable[str], change: Change, before: Any = answers) -> float:
        """Return the change of other members' answers by a disturbance; 0 if the model refuses what it is given."""
        hooks = [layers[name].register_forward_hook(disturbance.change_output) for name in names]
        try:
            return _compare(before, run(change), members)
        except Exception:  # it got what no call would give it
            return 0.0
        finally:
            for hook in hooks:
                hook.remove()

    with torch.random.fork_rng(sorted({x.device.index for x in iter_tensors(answers) if x.is_cuda})):
        if measure(layers, disturbance.change_input) < tolerance:
            return
        before = run(torch.clone)  # by the same kernels, which without gradients are others
        if measure((), torch.clone, before) > 0:  # not reproducible
            return
        share = measure(layers, disturbance.change_input, before)
        if share < tolerance:
            return
        guilty = next((name for name in layers if measure([name], torch.clone, before) >= tolerance), None)
    if guilty is None:
        where, repair = "the model mixes the rows of a batch", "give each row an answer of its own"
    else:
        where, repair = (
            f"{guilty} reads something else than rows",
            f"leave it out, e.g. with {leave_out(guilty)}",
        )
    raise WrapError(
        f"{where}, so that members would be mixed: a change of one changes the others' answers, {share:.2g} times as "
        f"much as its own; {repair}"
    )


def _is_rounded(model: nn.Module) -> bool:
    """Return True if products may have less than 32 bits."""
    if any(torch.is_autocast_enabled(kind) for kind in {p.device.type for p in model.parameters()} - {"meta"}):
        return True
    return any(p.element_size() < torch.float32.itemsize for p in model.parameters())


class _Disturbance:
    """Changes the first member's rows of tensors; those of other kinds, and whole numbers, stay as they are."""

    def __init__(self, members: int) -> None:
        self.members = members

    def change_input(self, x: Tensor) -> Tensor:
        """Give another order to the values, which stay in the range that the model expects."""
        changed: Tensor = self._change(x, 0, lambda first: first.flip(list(range(1, first.ndim))))
        return changed

    def change_output(self, leaf: Any, args: Any, output: Any) -> Any:  # noqa: ARG002
        """Give other values to the output of a layer, as its forward hook."""
        while isinstance(leaf, Replacement):
            leaf = leaf.leaf
        if isinstance(output, tuple) and isinstance(leaf, nn.RNNBase):  # its last states have rows in dimension 1
            states = tree_map(lambda h: self._change(h, 1, _move), output[1])
            return tree_map(lambda y: self._change(y, 0, _move), output[0]), states
        return tree_map(lambda y: self._change(y, 0, _move), output)

    def _change(self, x: Any, axis: int, change: Change) -> Any:
        if not isinstance(x, Tensor) or x.ndim <= axis or not x.is_floating_point() or x.shape[axis] % self.members:
            return x
        lines = x.shape[axis] // self.members
        first, kept = x.narrow(axis, 0, lines), x.narrow(axis, lines, x.shape[axis] - lines)
        return torch.cat([change(first), kept], axis)


def _move(x: Tensor) -> Tensor:
    size = x.float().square().mean().sqrt().nan_to_num(1, 1, 1)
    return x.flip(-1) * 1.5 + torch.where(size > 0, size, 1).to(x.dtype)


def _compare(before: Any, after: Any, members: int) -> float:
    """Return the largest change of other members, relative to that of the first, which was disturbed.

    Outputs count that have one entry per row.
    """
    share = 0.0
    for x, y in zip(iter_tensors(before), iter_tensors(after), strict=True):
        if not x.ndim or len(x) % members or x.shape != y.shape or not x.numel():
            continue
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        is_equal = (x == y) | (x.isnan() & y.isnan())
        difference = (x.to(wide) - y.to(wide)).abs().nan_to_num(float("inf")).masked_fill(is_equal, 0)
        first, *others = difference.reshape(members, -1).amax(1).tolist()
        share = max(share, max(others) / first if first else float(any(others)))
    return share


def _can_run_again(inputs: Any) -> bool:
    """Return True if a call can be repeated: inputs of other kinds, such as key-value caches, may have changed."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return False  # processes that do not all repeat it would wait for each other
    leaves: list[Any] = []
    tree_map(leaves.append, inputs)
    if any(isinstance(x, Tensor) and x.is_cuda for x in leaves) and torch.cuda.is_current_stream_capturing():
        return False
    plain = (Tensor, bool, int, float, str, type(None))
    return all(isinstance(x, plain) and not (isinstance(x, Tensor) and x.is_meta) for x in leaves)


def make_twin(model: nn.Module) -> Any:
    """Return a model over the same weights that can be run without a trace: with buffers of its own, but for large
    ones, and without the hooks that read what its layers return. None for a model that cannot be copied now."""
    try:
        twin = share_module(model, freeze=False)
    except WrapError:  # it may hold tensors of the last call
        return None
    for module in twin.modules():
        _get_hooks(module).clear()
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.numel() <= _SMALL:
                setattr(module, name, buffer.clone())
    return twin
