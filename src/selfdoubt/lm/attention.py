"""Attention of a position on itself, read while a model runs, without a matrix of attention weights.

Where attention is ``sdpa``, no weights exist: for the last positions, the queries and keys of some layers give the
weight by one row of dot products and its log-sum-exp. Where it is ``eager``, the weights are the module's own output.
The model's output is the same to the bit. Other kinds of attention are not read.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selfdoubt.lm.stepper import StepOutput
from selfdoubt.rows import expand

#: Name of the attention function that records, for transformers' registry.
_NAME = "selfdoubt_recorded_sdpa"
#: Arguments of an attention function that change weights in ways that are not computed here.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


class _Inputs(NamedTuple):
    """The inputs of one attention call, as far as the last positions need them."""

    query: Float[Tensor, "rows heads columns width"]
    key: Float[Tensor, "rows key_heads t width"]
    mask: Tensor | None  #: (rows or 1, heads or 1, columns, t): True, or a number to add
    scaling: float


class AttentionProbe:
    """A probe of some attention modules, see ``stepper.Probe``; the output's ``attention`` is None where it fails.

    Args:
        modules: Attention modules of a Hugging Face model, in the order of the layers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._columns = 0
        self._thread = 0
        self._recorded: dict[nn.Module, _Inputs | Tensor] = {}

    @contextmanager
    def capture(self, columns: int) -> Iterator[None]:
        """Record the last ``columns`` positions while the model runs."""
        self._columns, self._thread, self._recorded = columns, threading.get_ident(), {}
        kind = getattr(getattr(self._modules[0], "config", None), "_attn_implementation", None)
        with ExitStack() as stack:
            for module in self._modules:
                if kind == "eager":
                    stack.enter_context(module.register_forward_hook(self._keep_weights))
                elif kind in ("sdpa", _NAME):  # the latter while another thread runs the same model
                    stack.enter_context(_record_calls(module, self))
            yield

    def read(self, output: StepOutput) -> StepOutput:
        """Return the output with the attention that was recorded."""
        recorded, self._recorded = self._recorded, {}
        if len(recorded) < len(self._modules):
            return output
        members, batch, columns = output.logits.shape[:3]
        rows = batch if output.has_base else members * batch
        each = [recorded[module] for module in self._modules]
        if len({_count_heads(x) for x in each}) > 1 or any(
            _count_rows(x) not in (batch, members * batch) for x in each
        ):
            return output
        # Below a late fork all members are one row.
        tensors = [_repeat(x[:rows].float(), rows) for x in each if isinstance(x, Tensor)]
        weights = (
            torch.stack(tensors) if tensors else _weigh_diagonal([x for x in each if isinstance(x, _Inputs)], rows)
        )
        # (layers, members * batch, heads, columns) -> (1, batch, columns, layers, heads)
        weights = weights.detach().view(len(weights), -1, batch, *weights.shape[2:]).mean(1).permute(1, 3, 0, 2)[None]
        return replace(output, attention=F.pad(weights, (0, 0, 0, 0, columns - weights.shape[2], 0)))

    def record(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, **more: Any
    ) -> None:
        """Record the call of a module, if its weights can be computed from it."""
        if threading.get_ident() != self._thread or any(more.get(name) is not None for name in _UNSUPPORTED):
            return
        columns, t = self._columns, key.shape[2]
        if mask is not None and mask.ndim != 4:
            return
        if mask is None and 1 < columns <= t:  # causal: the last row of a single column sees all keys
            mask = torch.ones(query.shape[2], t, dtype=torch.bool, device=key.device).tril(t - query.shape[2])[
                None, None
            ]
        if columns < query.shape[2]:
            query = query[:, :, -columns:].clone()  # a view would keep all of it
        mask = None if mask is None else mask[:, :, -columns:, :t]
        self._recorded[module] = _Inputs(query, key, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)

    def _keep_weights(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        """Keep the diagonal of the weights that eager attention returns."""
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and threading.get_ident() == self._thread:
            t = weights.shape[3]
            last = weights[:, :, -self._columns :, t - self._columns :]
            self._recorded[module] = last.diagonal(dim1=-2, dim2=-1).clone()


class _RecordedConfig:
    """A view of an attention module's config that names the attention function that records."""

    _attn_implementation = _NAME

    def __init__(self, config: Any, probe: AttentionProbe) -> None:
        self.original = config
        self.probe = probe

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.original, name)


@contextmanager
def _record_calls(module: nn.Module, probe: AttentionProbe) -> Iterator[None]:
    """Let a probe see the calls of one module, and no other part of the model."""
    _register()
    config: Any = module.config
    original = config.original if isinstance(config, _RecordedConfig) else config
    module.config = _RecordedConfig(original, probe)  # type: ignore[assignment]
    try:
        yield
    finally:
        module.config = original


def _recorded_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Run ``sdpa`` attention as the model would, and let the module's probe see its inputs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # A model's file may have functions of its own.
    functions = getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    config = module.config
    if isinstance(config, _RecordedConfig):
        more = {name: x for name, x in options.items() if name != "scaling"}
        config.probe.record(module, query, key, attention_mask, options.get("scaling"), **more)
    return functions["sdpa"](module, query, key, value, attention_mask, **options)


def _register() -> None:
    """Register the attention function that records with transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(_NAME, _recorded_sdpa)


def _weigh_diagonal(calls: Sequence[_Inputs], rows: int) -> Float[Tensor, "layers rows heads columns"]:
    """Return softmax(q k^T scale + mask) of the first rows on their own positions, in float32."""
    scores = []
    for query, key, mask, scaling in calls:
        query, key = query[:rows], key[:rows]
        few, heads, columns, width = query.shape
        grouped = query.reshape(few, key.shape[1], -1, width)  # heads that share a key, one after the other
        s = (grouped @ key.transpose(-1, -2)).float().view(few, heads, columns, -1) * scaling
        if mask is not None:
            mask = mask[:rows]
            s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
        scores.append(_repeat(s, rows))
    longest = max(s.shape[-1] for s in scores)  # a sliding window keeps fewer keys
    stacked = torch.stack([F.pad(s, (longest - s.shape[-1], 0), value=-torch.inf) for s in scores])
    diagonal = stacked[..., longest - stacked.shape[-2] :].diagonal(dim1=-2, dim2=-1)
    return (diagonal - stacked.logsumexp(-1)).exp()


def _repeat(x: Tensor, rows: int) -> Tensor:
    """Return one row per member of a layer below a late fork; of another layer its rows as they are."""
    return expand(x, rows // len(x))


def _count_rows(recorded: _Inputs | Tensor) -> int:
    return len(recorded if isinstance(recorded, Tensor) else recorded.query)


def _count_heads(recorded: _Inputs | Tensor) -> int:
    return (recorded if isinstance(recorded, Tensor) else recorded.query).shape[1]


def find_attention(layer: nn.Module) -> nn.Module | None:
    """Return the self-attention of a Hugging Face decoder layer; None where there is not just one."""
    modules = [m for m in layer.modules() if "Attention" in type(m).__name__ and hasattr(m, "config")]
    return modules[0] if len(modules) == 1 else None


def middle_third(layers: int) -> range:
    """Return the layers that RAUQ reads: the middle third, one more at its end (Vazhentsev et al., 2025).

    Example:
        >>> middle_third(30)
        range(10, 21)
    """
    return range(layers // 3, min(layers, -(-2 * layers // 3) + 1))
