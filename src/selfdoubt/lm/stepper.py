"""Runs a model step by step, from token ids to logits of all members, with one key-value cache for the whole batch.

``Stepper`` is what decoding needs of a model; ``HFStepper`` is the one for Hugging Face. Rows in the cache are
member-major, as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfdoubt import density, risk
from selfdoubt.errors import PromptError, WrapError
from selfdoubt.lm import cache
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.few_rows import find_linears, use_few_rows
from selfdoubt.lm.hidden_states import capture_outputs, find_decoder_layer
from selfdoubt.lm.probe import Probe
from selfdoubt.members import Wrapped, innermost
from selfdoubt.rows import expand, unfold

#: Logits of a piece of prompt are at most this many numbers, whatever the vocabulary (128 MiB in float32).
_CHUNK = 2**25


@dataclass(frozen=True)
class StepOutput:
    """The output of one step: logits, and what else was computed at each position."""

    logits: Float[Tensor, "members batch *t classes"]
    #: Predicted deviations, of those members that answer; None without a sculpt.
    scale: Float[Tensor, "answering batch *t classes"] | None = None
    #: The base's where it answers, else the mean over members; None unless asked for.
    states: Float[Tensor, "1 batch *t layers width"] | None = None
    #: Attention of each position on itself, of the row that answers; None unless asked for.
    attention: Float[Tensor, "1 batch *t attended heads"] | None = None
    #: Signals of a position that depend on no chosen token, by name (see ``scores.Signal``); all grow with doubt.
    signals: Mapping[str, Float[Tensor, "1 batch *t"]] = field(default_factory=dict)
    has_base: bool = False  #: member 0 is the base model, which alone answers

    @property
    def mixture(self) -> Float[Tensor, "batch *t classes"]:
        """The distribution that answers, see ``risk.mixture``: the members' mean, or the base's."""
        return risk.mixture(self.logits, has_base=self.has_base)

    def at(self, index: Any) -> StepOutput:
        """Return the output at some places of the axis behind the batch."""
        return self._each(lambda x: x[:, :, index])

    def select(self, sequences: Sequence[int]) -> StepOutput:
        """Return the outputs of these sequences."""
        return self._each(lambda x: x[:, list(sequences)])

    def join(self, other: StepOutput) -> StepOutput:
        """Return the outputs of both batches, in this order. What only one of them has is left out."""

        def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b], 1)

        return StepOutput(
            torch.cat([self.logits, other.logits], 1),
            cat(self.scale, other.scale),
            cat(self.states, other.states),
            cat(self.attention, other.attention),
            {name: torch.cat([x, other.signals[name]], 1) for name, x in self.signals.items() if name in other.signals},
            self.has_base,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> StepOutput:
        """Return the output with a change made to each of its tensors."""

        def optional(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        return StepOutput(
            change(self.logits),
            optional(self.scale),
            optional(self.states),
            optional(self.attention),
            {name: change(x) for name, x in self.signals.items()},
            self.has_base,
        )


@runtime_checkable
class Stepper(Protocol):
    """The interface of a model that reads prompts, then one token per sequence and step."""

    @property
    def context(self) -> int | None:
        """Most tokens in a sequence, or None."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Read left-padded prompts in pieces; yield (first column, logits). Exhaust it before ``step``."""

    def step(self, ids: Int[Tensor, " batch"]) -> StepOutput:
        """Append one token to every sequence."""

    def extend(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Append a text to every sequence, right-padded, in pieces like ``start``; no step can follow."""

    def keep(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences of the batch; one that is named twice is kept twice."""

    def join(self, other: Any) -> None:
        """Add the sequences of another stepper of the same kind and model behind this one's own."""


class HFStepper:
    """A wrapped (or plain) Hugging Face causal language model with a key-value cache over all members.

    Args:
        model: The model.
        layers: Decoder layers whose hidden states come with the logits; 0 is the first.
        sizer: Sizer of the pieces in which prompts and texts are read; None reads as much at once as memory for the
            logits allows.
        probes: Probes of the positions that predict an answer's tokens: of a prompt the last one.

    Raises:
        ConfigError: If the model has no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] = (),
        sizer: ChunkSizer | None = None,
        probes: Sequence[Probe] = (),
    ) -> None:
        self._probes = list(probes)
        self._sizer = sizer
        self.members = model.spec.members(training=False) if isinstance(model, Wrapped) else 1
        self.has_base = isinstance(model, Wrapped) and model.spec.has_base
        self._model = model
        measured = density.find_measured_leaf(model)
        # A distance that is pooled over positions is not one of a token.
        self._measured = measured if measured is not None and measured.is_fitted and not measured.pooled else None
        self._has_background = self._measured is not None and self._measured.has_background
        base = innermost(model)
        self._blocks = [find_decoder_layer(base, layer) for layer in layers]
        self._linears = find_linears(model)
        self._config = base.config.get_text_config()  # type: ignore[union-attr, operator]
        self._device = next(base.parameters()).device
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._rows = 0

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    @property
    def context(self) -> int | None:
        """Most tokens in a sequence, or None."""
        limit = getattr(self._config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Read left-padded prompts in pieces; yield (first column, logits). Exhaust it before ``step``.

        Raises:
            PromptError: If a prompt is empty or does not fit the context.
        """
        yield from self._pieces(self.begin(prompts), 0, probed=1)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Int[Tensor, "rows t"]:
        """Prepare to ``read`` prompts; return their ids, left-padded, for all members. Raises as ``start`` does."""
        width = max(len(p) for p in prompts)
        if not min(len(p) for p in prompts):
            raise PromptError("a prompt needs at least one token, got an empty one")
        if self.context is not None and width >= self.context:
            raise PromptError(
                f"the prompt has {width} tokens, and the model reads at most {self.context} with its answer; shorten it"
            )
        padded = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self._device)
        lengths = torch.tensor([len(p) for p in prompts], device=self._device)
        mask = (torch.arange(width, device=self._device) >= width - lengths[:, None]).long()
        # Without padding, models run faster (and just as right) when they are given no mask at all.
        self._mask = expand(mask, self.members) if min(len(p) for p in prompts) < width else None
        self._cache = None
        return expand(padded, self.members)

    @torch.inference_mode()
    def read(self, rows: Int[Tensor, "rows t"], first: int, keep: Callable[..., None]) -> StepOutput:
        """Read the next columns of prompts, from ``first`` on, and return the output at the last one.

        ``keep`` gets logits, scale, states and signals of all that the model returned them for, see ``StepOutput``.
        """
        if not first:
            self._cache = None
        return self._forward(rows, first, 1, keep).at(-1)

    @torch.inference_mode()
    def extend(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Append a text to every sequence, right-padded, in pieces; yield (first column, logits). No step can follow.

        Raises:
            PromptError: If a sequence does not fit the context.
        """
        before, width = self._cache.get_seq_length(), max(len(t) for t in texts)
        padded = torch.tensor([list(t) + [0] * (width - len(t)) for t in texts], device=self._device)
        lengths = torch.tensor([len(t) for t in texts], device=self._device)
        longest = int(((before if self._mask is None else self._mask[: len(texts)].sum(1)) + lengths).max())
        if self.context is not None and longest > self.context:
            raise PromptError(
                f"prompt and text have {longest} tokens, and the model reads at most {self.context}; shorten them"
            )
        rows = expand(padded, self.members)
        if min(len(t) for t in texts) < width or self._mask is not None:
            new = expand((torch.arange(width, device=self._device) < lengths[:, None]).long(), self.members)
            old = new.new_ones(len(new), before) if self._mask is None else self._mask
            self._mask = torch.cat([old, new], dim=1)
        yield from self._pieces(rows, before)

    def _pieces(
        self, rows: Int[Tensor, "rows t"], before: int, probed: int | None = None
    ) -> Iterator[tuple[int, StepOutput]]:
        """Read as many columns at a time as their logits fit; ``before`` columns are read already."""
        largest, width, first = max(1, _CHUNK // (len(rows) * self._config.vocab_size)), rows.shape[1], 0
        while first < width:
            columns = self.size_piece(len(rows), before + first, min(largest, width - first))
            yield first, self._forward(rows[:, first : first + columns], before + first, probed or columns)
            first += columns

    def size_piece(self, rows: int, before: int, most: int) -> int:
        """Choose the columns of a piece of prompts or texts, at most ``most``, after the ``before`` ones."""
        return most if self._sizer is None else self._sizer.columns(rows, before, most)

    @torch.inference_mode()
    def step(self, ids: Int[Tensor, " batch"]) -> StepOutput:
        """Append one token to every sequence; logits are ``(members, batch, classes)``."""
        first = self._cache.get_seq_length()
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        return self._forward(expand(ids[:, None], self.members), first, 1).at(-1)

    @torch.inference_mode()
    def keep(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences of the batch; one that is named twice is kept twice."""
        batch = self._rows // self.members
        index = torch.tensor(sequences, device=self._device)
        rows = (torch.arange(self.members, device=self._device)[:, None] * batch + index).flatten()
        self._cache.batch_select_indices(rows)
        self._rows = len(rows)
        if self._mask is not None:
            self._mask = self._mask[rows]
            self._trim()

    @torch.inference_mode()
    def join(self, other: HFStepper) -> None:
        """Add the sequences of another stepper of the same model behind this one's own.

        Raises:
            WrapError: If the model's cache is of a kind that cannot be joined.
        """
        mine, theirs = self._lengths(), other._lengths()
        self._cache = cache.join_caches(self._cache, other._cache, self.members)
        self._rows += other._rows
        width = self._cache.get_seq_length()
        used = torch.cat([mine, theirs])[:, None] > torch.arange(width - 1, -1, -1, device=self._device)
        self._mask = expand(used.long(), self.members)
        self._trim()

    def _lengths(self) -> Int[Tensor, " batch"]:
        """Return the number of tokens that each sequence has in the cache."""
        batch = self._rows // self.members
        if self._mask is None:
            return torch.full((batch,), self._cache.get_seq_length(), device=self._device)
        return self._mask[:batch].sum(1)

    def _trim(self) -> None:
        """Forget the columns in which all sequences have padding, and the mask where none has any."""
        assert self._mask is not None
        unused = int(self._mask.argmax(1).min())
        if unused:
            cache.trim(self._cache, unused)
            self._mask = self._mask[:, unused:]
        if self._mask.all():
            self._mask = None

    def _forward(
        self, rows: Int[Tensor, "rows t"], first: int, probed: int, keep: Callable[..., None] | None = None
    ) -> StepOutput:
        """Run the model on these columns; probes read the last ``probed`` of them."""
        self._rows = len(rows)
        inputs: dict[str, Any] = {"input_ids": rows, "past_key_values": self._cache, "use_cache": True}
        if self._mask is not None:
            mask = self._mask[:, : first + rows.shape[1]]
            inputs["attention_mask"] = mask
            if self._takes_positions:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, first:]
        with ExitStack() as stack:
            captured = stack.enter_context(capture_outputs(self._blocks))
            stack.enter_context(use_few_rows(self._linears, rows.numel()))
            for probe in self._probes:
                stack.enter_context(probe.capture(probed))
            if isinstance(self._model, Wrapped):
                output, scales = self._model.forward_rows(**inputs)
            else:
                output, scales = self._model(**inputs), None
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise WrapError(f"{type(self._model).__name__} keeps no key-value cache, which decoding needs")
        scale = None
        if scales is not None:
            assert isinstance(self._model, Wrapped)
            std = self._model.distribution.std((output.logits, scales.logits))
            scale = self.pick_answering(std)
        states = None
        if captured:
            by_member = [self.pick_answering(h.detach()) for h in captured]
            states = torch.stack([h.float().mean(0, keepdim=True) for h in by_member], -2)
        logits, signals = unfold(output.logits, self.members), self._measure()
        if keep is not None:
            keep(logits, scale, states, signals)
            logits, signals = logits[:, :, -1:], {name: x[:, :, -1:] for name, x in signals.items()}
            scale, states = (None if x is None else x[:, :, -1:] for x in (scale, states))
        result = StepOutput(logits, scale, states, signals=signals, has_base=self.has_base)
        for probe in self._probes:
            result = probe.read(result)
        return result

    def _measure(self) -> dict[str, Float[Tensor, "1 batch t"]]:
        """Return the densities of the positions that just ran: the base's where it answers, or the mean over members.

        The Gaussian of answers is the usual one of the measured leaf, and that of all tokens its background.
        """
        if self._measured is None:
            return {}
        rows = self.pick_answering(self._measured.read_features())
        usual = self._measured.usual(rows).mean(0, keepdim=True)
        if not self._has_background:
            return {"density": usual}
        background = self._measured.background(rows).mean(0, keepdim=True)
        return {"density": background, "relative_density": usual - background}

    def pick_answering(self, rows: Float[Tensor, "rows *rest"]) -> Float[Tensor, "members batch *rest"]:
        """Return the rows of the members that answer: the base's alone where there is one."""
        members = unfold(rows, self.members)
        return members[:1] if self.has_base else members
