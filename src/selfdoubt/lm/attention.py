"""Attention of a position on itself, read while a model runs, without a matrix of attention weights.

Where attention is ``sdpa``, no weights exist: for the last positions, the queries and keys of some layers give the
weight by one row of dot products and its log-sum-exp. Where it is ``eager``, the weights are the module's own output.
The model's output is the same to the bit. Other kinds of attention are not read.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from selfdoubt.lm.step_output import StepOutput
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


class _Recording:
    """The calls of some attention modules in one run, in one thread."""

    def __init__(self, count: int) -> None:
        self.columns = 0  #: number of the last positions that count
        self.places: Tensor | None = None  #: see ``step_output.Probe``
        self._thread = 0
        self._recorded: list[_Inputs | Tensor | None] = [None] * count

    def begin(self, columns: int, places: Tensor | None) -> None:
        """Prepare for a run of this thread."""
        self.columns, self.places, self._thread = columns, places, threading.get_ident()
        self._recorded[:] = [None] * len(self._recorded)

    def take(self) -> list[_Inputs | Tensor]:
        """Return what was recorded, and forget it."""
        recorded = [x for x in self._recorded if x is not None]
        self._recorded[:] = [None] * len(self._recorded)
        return recorded

    def record(
        self, place: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, **more: Any
    ) -> None:
        """Record the call of a module, if its weights can be computed from it."""
        if not self._is_mine() or any(more.get(name) is not None for name in _UNSUPPORTED):
            return
        columns, t = self.columns, key.shape[2]
        if mask is not None and mask.ndim != 4:
            return
        if mask is None and 1 < columns <= t:  # causal: the last row of a single column sees all keys
            mask = torch.ones(query.shape[2], t, dtype=torch.bool, device=key.device).tril(t - query.shape[2])[
                None, None
            ]
        if columns < query.shape[2]:
            query = query[:, :, -columns:].clone()  # a view would keep all of it
        mask = None if mask is None else mask[:, :, -columns:, :t]
        self._recorded[place] = _Inputs(query, key, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)

    def _is_mine(self) -> bool:
        """Return whether the run is that of the thread that captures."""
        return torch.compiler.is_compiling() or threading.get_ident() == self._thread

    def build_hook(self, place: int) -> Callable[[nn.Module, Any, Any], None]:
        """Build a hook that keeps the diagonal of the weights that the eager attention at this place returns."""

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4 or not self._is_mine():
                return
            t = weights.shape[3]
            last = weights[:, :, -self.columns :]
            if self.places is None:
                self._recorded[place] = last[..., t - self.columns :].diagonal(dim1=-2, dim2=-1).clone()
            else:
                self._recorded[place] = _gather_places(last, self.places)

        return keep


class AttentionProbe:
    """A probe of some attention modules, see ``step_output.Probe``; the output's ``attention`` is None where it fails.

    Args:
        modules: Attention modules of a Hugging Face model, in the order of the layers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._recording = _Recording(len(self._modules))
        self._hooks = [self._recording.build_hook(place) for place in range(len(self._modules))]
        self._configs: list[_RecordedConfig] = []

    @contextmanager
    def capture(self, columns: int, places: Int[Tensor, " batch"] | None = None) -> Iterator[None]:
        """Record the last ``columns`` positions while the model runs; see ``step_output.Probe``."""
        self._recording.begin(columns, places)
        kind = getattr(getattr(self._modules[0], "config", None), "_attn_implementation", None)
        with ExitStack() as stack:
            if kind == "eager":
                for module, hook in zip(self._modules, self._hooks, strict=True):
                    stack.enter_context(module.register_forward_hook(hook))
            elif kind in ("sdpa", _NAME):  # the latter while another thread runs the same model
                self._configs = self._configs or [
                    _RecordedConfig(module, self._recording, place) for place, module in enumerate(self._modules)
                ]
                for module, config in zip(self._modules, self._configs, strict=True):
                    stack.enter_context(_replace_config(module, config))
            yield

    def read(self, output: StepOutput) -> StepOutput:
        """Return the output with the attention that was recorded."""
        each = self._recording.take()
        if len(each) < len(self._modules):
            return output
        members, batch, columns = output.logits.shape[:3]
        rows = batch if output.has_base else members * batch
        if len({_count_heads(x) for x in each}) > 1 or any(
            _count_rows(x) not in (batch, members * batch) for x in each
        ):
            return output
        # Below a late fork all members are one row.
        tensors = [_repeat(x[:rows].float(), rows) for x in each if isinstance(x, Tensor)]
        calls = [x for x in each if isinstance(x, _Inputs)]
        weights = torch.stack(tensors) if tensors else _weigh_diagonal(calls, rows, self._recording.places)
        # (layers, members * batch, heads, columns) -> (1, batch, columns, layers, heads)
        weights = weights.detach().view(len(weights), -1, batch, *weights.shape[2:]).mean(1).permute(1, 3, 0, 2)[None]
        return replace(output, attention=F.pad(weights, (0, 0, 0, 0, columns - weights.shape[2], 0)))


class _RecordedConfig:
    """A view of an attention module's config that names the attention function that records."""

    _attn_implementation = _NAME

    def __init__(self, module: nn.Module, recording: _Recording, place: int) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config = module.config
        self.original: Any = config.original if isinstance(config, _RecordedConfig) else config
        self.recording, self.place = recording, place
        # A model's file may have functions of its own.
        self.functions = getattr(
            sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS
        )

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.original, name)


@contextmanager
def _replace_config(module: nn.Module, config: _RecordedConfig) -> Iterator[None]:
    """Let a probe see the calls of one module, and no other part of the model."""
    _register()
    module.config = config  # type: ignore[assignment]
    try:
        yield
    finally:
        module.config = config.original


def _recorded_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Run ``sdpa`` attention as the model would, and let the module's probe see its inputs."""
    config = module.config
    if not isinstance(config, _RecordedConfig):  # another thread's probe has just left
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    more = {name: x for name, x in options.items() if name != "scaling"}
    config.recording.record(config.place, query, key, attention_mask, options.get("scaling"), **more)
    return config.functions["sdpa"](module, query, key, value, attention_mask, **options)


def _register() -> None:
    """Register the attention function that records with transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(_NAME, _recorded_sdpa)


def _weigh_diagonal(
    calls: Sequence[_Inputs], rows: int, places: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, "layers rows heads columns"]:
    """Return softmax(q k^T scale + mask) of the first rows on their own positions, in float32."""
    scores = []
    for query, key, mask, scaling in calls:
        query, key = query[:rows], key[:rows]
        few, heads, columns, width = query.shape
        grouped = query.reshape(few, key.shape[1], -1, width)  # heads that share a key, one after the other
        s = (grouped @ key.transpose(-1, -2)).float().view(few, heads, columns, -1) * scaling
        if mask is not None:
            mask = mask[:rows]
            s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
        scores.append(_repeat(s, rows))
    longest = max(s.shape[-1] for s in scores)  # a sliding window keeps fewer keys
    stacked = torch.stack([F.pad(s, (longest - s.shape[-1], 0), value=-torch.inf) for s in scores])
    if places is None:
        diagonal = stacked[..., longest - stacked.shape[-2] :].diagonal(dim1=-2, dim2=-1)
    else:
        diagonal = _gather_places(stacked, places)
    return (diagonal - stacked.logsumexp(-1)).exp()


def _gather_places(
    weights: Float[Tensor, "*layers rows heads 1 t"], places: Int[Tensor, " batch"]
) -> Float[Tensor, "*layers rows heads 1"]:
    """Return each row's weight at its sequence's place, of a single column; places beyond the last are the last."""
    rows, t = weights.shape[-4], weights.shape[-1]
    of_rows = places.clamp_max(t - 1).repeat(rows // len(places))
    index = of_rows[:, None, None, None].expand(*weights.shape[:-1], 1)
    return weights.gather(-1, index).squeeze(-1)


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
