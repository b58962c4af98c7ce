"""Kernels: the change of a leaf's output by a change of its parameters, one per member, for all members at once.

Each kernel computes ``delta_m(x_m)``, linear in the deviation, for the leaves in ``KERNELS``; ``loop`` runs any other
leaf once per member. Rows are member-major, so a leaf's input folds to ``(members, rows_per_member, ...)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from selfdoubt.compat import is_quantized, is_transposed
from selfdoubt.errors import WrapError
from selfdoubt.rows import unfold
from selfdoubt.targets import Leaf
from selfdoubt.tree import iter_tensors, tree_map

#: Deviations by parameter name, ``(members, *parameter.shape)``; low rank: "weight_a" and "weight_b".
Deviations = Mapping[str, Float[Tensor, "members ..."]] | nn.ParameterDict
Kernel = Callable[[nn.Module, Tensor, Deviations], Tensor]


def _members(deviations: Deviations) -> int:
    return int(next(iter(deviations.values())).shape[0])


def linear(leaf: nn.Module, x: Float[Tensor, "rows *t in"], deviations: Deviations) -> Float[Tensor, "rows *t out"]:
    """Return ``x_m W_m^T + b_m``; with low rank ``x_m A_m^T B_m + b_m`` for A ``(m, r, in)`` and B ``(m, r, out)``."""
    folded = x.reshape(_members(deviations), -1, x.shape[-1])
    delta = None
    if "weight" in deviations:
        weight = deviations["weight"]
        delta = folded @ (weight if is_transposed(leaf) else weight.transpose(1, 2))
    elif "weight_a" in deviations:
        delta = folded @ deviations["weight_a"].transpose(1, 2) @ deviations["weight_b"]
    if "bias" in deviations:
        bias = deviations["bias"][:, None]
        delta = bias.expand(-1, folded.shape[1], -1) if delta is None else delta + bias
    assert delta is not None
    return delta.reshape(*x.shape[:-1], delta.shape[-1])


def embedding(
    leaf: nn.Module,  # noqa: ARG001
    ids: Shaped[Tensor, "rows *t"],
    deviations: Deviations,
) -> Float[Tensor, "rows *t d"]:
    """Look up each member's rows in its own table, ``(m, entries, d)`` or factors ``(m, entries, r) (m, r, d)``."""
    folded = unfold(ids, _members(deviations))
    member = torch.arange(len(folded), device=ids.device).view(-1, *[1] * (folded.ndim - 1))
    if "weight" in deviations:
        return deviations["weight"][member, folded].flatten(0, 1)
    looked_up = deviations["weight_a"][member, folded]
    return (looked_up.flatten(1, -2) @ deviations["weight_b"]).reshape(*ids.shape, -1)


def convolution(leaf: nn.Module, x: Float[Tensor, "rows c *space"], deviations: Deviations) -> Tensor:
    """Run one grouped convolution: members side by side in the channels."""
    assert isinstance(leaf, (nn.Conv1d, nn.Conv2d))
    members = _members(deviations)
    folded = unfold(x, members)
    delta = None
    if "weight" in deviations:
        conv = F.conv1d if isinstance(leaf, nn.Conv1d) else F.conv2d
        side_by_side = folded.transpose(0, 1).flatten(1, 2)
        out = conv(
            side_by_side, deviations["weight"].flatten(0, 1), None, leaf.stride, leaf.padding, leaf.dilation,
            members * leaf.groups,
        )  # fmt: skip
        delta = out.reshape(len(out), members, -1, *out.shape[2:]).transpose(0, 1).flatten(0, 1)
    if "bias" in deviations:
        space = [1] * (x.ndim - 2)
        bias = deviations["bias"].repeat_interleave(folded.shape[1], 0).view(len(x), -1, *space)
        delta = bias if delta is None else delta + bias
    assert delta is not None
    return delta


def norm(leaf: nn.Module, x: Float[Tensor, "rows ..."], deviations: Deviations) -> Float[Tensor, "rows ..."]:
    """Return ``normalised(x_m) * w_m + b_m`` for LayerNorm and RMSNorm."""
    assert isinstance(leaf, (nn.LayerNorm, nn.RMSNorm))
    shape = list(leaf.normalized_shape)
    folded = unfold(x, _members(deviations))
    middle = [1] * (folded.ndim - 1 - len(shape))
    delta = None
    if "weight" in deviations:
        normalised = (
            F.layer_norm(folded, shape, None, None, leaf.eps)
            if isinstance(leaf, nn.LayerNorm)
            else F.rms_norm(folded, shape, None, leaf.eps)
        )
        delta = normalised * deviations["weight"].view(len(folded), *middle, *shape)
    if "bias" in deviations:
        bias = deviations["bias"].view(len(folded), *middle, *shape)
        delta = bias.expand_as(folded) if delta is None else delta + bias
    assert delta is not None
    return delta.flatten(0, 1)


KERNELS: dict[type[nn.Module], Kernel] = {
    nn.Linear: linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: linear,
    nn.Embedding: embedding,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.LayerNorm: norm,
    nn.RMSNorm: norm,
}


def find_kernel(leaf: nn.Module) -> Kernel | None:
    """Return the kernel for exactly this type (a subclass may compute something else); None to use ``loop``."""
    if is_quantized(leaf) or is_transposed(leaf):
        return linear
    if isinstance(leaf, (nn.Conv1d, nn.Conv2d)) and leaf.padding_mode != "zeros":
        return None
    if isinstance(leaf, nn.Embedding) and leaf.max_norm is not None:
        return None
    return KERNELS.get(type(leaf))


def count_features(leaf: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output features of a linear layer, packed or not; of entries and features of an
    embedding."""
    if isinstance(leaf, nn.Embedding):
        return leaf.num_embeddings, leaf.embedding_dim
    if isinstance(leaf, nn.Linear):
        return leaf.in_features, leaf.out_features
    weight = leaf.get_parameter("weight")  # Hugging Face's Conv1D
    return weight.shape[0], weight.shape[1]


def find_rows(leaf: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor among a leaf's inputs, which has the rows of all members.

    Raises:
        WrapError: If there is none.
    """
    first = next(iter_tensors((args, kwargs)), None)
    if first is None:
        raise WrapError(f"{type(leaf).__name__} gets no tensor that has a batch; leave it out with param_filter")
    return first


def loop(
    leaf: nn.Module,
    deviations: Deviations,
    alpha: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    base_rows: int = 0,
) -> Any:
    """Run the leaf once per member with its own parameters: slow, and right for any leaf with the batch first.

    The first ``base_rows`` rows run with the leaf's parameters as they are.

    Raises:
        WrapError: If the leaf takes a packed sequence, one without a batch, no tensor, or a key-value cache, to which
            every member would write; or if it gives a tensor without the batch in dimension 0.
    """
    members = _members(deviations)
    parameters = dict(leaf.named_parameters())
    first = find_rows(leaf, args, kwargs)
    cache = next((x for x in (*args, *kwargs.values()) if hasattr(x, "update") and not isinstance(x, Mapping)), None)
    if cache is not None:
        raise WrapError(
            f"{type(leaf).__name__} writes to a cache ({type(cache).__name__}), which its members would share; choose "
            "layers inside of it, e.g. with param_filter='in_proj|out_proj', or call the model with use_cache=False"
        )
    rows = len(first)
    share = (rows - base_rows) // members
    if any(isinstance(x, PackedSequence) for x in (*args, *kwargs.values())) or base_rows + members * share != rows:
        raise WrapError(f"{type(leaf).__name__} reads a packed sequence, not rows; leave it out with param_filter")
    if isinstance(leaf, nn.RNNBase) and first.ndim == 2:
        raise WrapError(
            f"{type(leaf).__name__} reads one sequence without a batch, of shape {tuple(first.shape)}; "
            "give it a batch, e.g. x[None]"
        )
    # Rows of each run of the leaf: those of the base, if it has some, and of each member.
    spans: list[tuple[int | None, int, int]] = [(None, 0, base_rows)] if base_rows else []
    spans += [(m, base_rows + m * share, share) for m in range(members)]
    # A recurrent layer's state, the second of its inputs and outputs, has the rows in dimension 1.
    axes = (0, 1) if isinstance(leaf, nn.RNNBase) else (0, 0)

    # An attention mask is one for all rows, or has lines for each head of a row.
    is_attention = isinstance(leaf, nn.MultiheadAttention)
    mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None) if is_attention else None

    # An input that is given twice stays one: attention projects a query that is its key in one product.
    pieces: dict[tuple[int, int, int], Tensor] = {}

    def cut(tree: Any, start: int, length: int, axis: int) -> Any:
        def of_member(x: Any) -> Any:
            if x is mask and isinstance(x, Tensor):
                heads = len(x) // rows
                return x if x.ndim == 2 else x.narrow(0, start * heads, length * heads)
            if not isinstance(x, Tensor) or x.ndim <= axis or x.shape[axis] != rows:
                return x
            key = (id(x), axis, start)
            if key not in pieces:
                pieces[key] = x.narrow(axis, start, length)
            return pieces[key]

        return tree_map(of_member, tree)

    def join(axis: int, *outputs: Any) -> Any:
        def cat(*xs: Any) -> Any:
            if not isinstance(xs[0], Tensor):
                return xs[0]
            lengths = [x.shape[axis] if x.ndim > axis else None for x in xs]
            if lengths != [length for _, _, length in spans]:
                raise WrapError(
                    f"{type(leaf).__name__} gives a tensor of shape {tuple(xs[0].shape)} for {spans[0][2]} rows, "
                    f"and members need the rows in dimension {axis}; leave it out with param_filter"
                )
            return xs[0] if len(xs) == 1 else torch.cat(xs, axis)  # one alone keeps its strides, so its bits

        return tree_map(cat, *outputs)

    outputs = []
    for member, start, length in spans:
        changed: dict[str, Tensor] = {}
        for key, deviation in deviations.items() if member is not None else ():
            path = key.replace("/", ".")
            changed[path] = parameters[path] + alpha * deviation[member].to(parameters[path].dtype)
        inputs = tuple(cut(a, start, length, axes[min(i, 1)]) for i, a in enumerate(args))
        named = {name: cut(a, start, length, axes[name == "hx"]) for name, a in kwargs.items()}
        outputs.append(functional_call(leaf, changed, inputs, named))
    if isinstance(outputs[0], tuple) and axes[1]:
        return tuple(join(axis, *ys) for axis, ys in zip(axes, zip(*outputs, strict=True), strict=True))
    return join(0, *outputs)


def check_rows(model: nn.Module, leaf: Leaf) -> None:
    """Check that members can be rows of dimension 0: a leaf must not see time there, or an unknown choice of rows.

    Raises:
        WrapError: If the leaf, or the transformer layer around it, has ``batch_first=False``, or if it is one expert of
            a routed mixture.
    """
    steps = leaf.name.split(".")
    around = [model.get_submodule(".".join(steps[:end])) for end in range(len(steps))]
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    for module in (leaf.module, *(m.self_attn for m in around if isinstance(m, layers))):
        if getattr(module, "batch_first", True) is False:
            raise WrapError(
                f"{leaf.name} is {type(leaf.module).__name__} with batch_first=False, and members need the batch in "
                "dimension 0; build it with batch_first=True"
            )
    if re.search(r"(^|\.)experts\.\d+(\.|$)", leaf.name):
        raise WrapError(
            f"{leaf.name} is one expert of a mixture and sees routed tokens, not rows; "
            'leave the experts out, e.g. param_filter="q_proj|v_proj"'
        )
