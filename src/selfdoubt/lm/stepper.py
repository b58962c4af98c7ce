"""Runs a Hugging Face model step by step, from token ids to logits of all members, with one key-value cache.

Rows in the cache are member-major, as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfdoubt import density
from selfdoubt.errors import PromptError, WrapError
from selfdoubt.lm import cache
from selfdoubt.lm.attention_backends import steady_attention
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.grouped_queries import group_queries
from selfdoubt.lm.hidden_states import OutputRecorder, find_decoder_layer
from selfdoubt.lm.late_fork import LateFork, find_late_fork
from selfdoubt.lm.prepacked import find_products, use_products
from selfdoubt.lm.step_output import Probe, StepOutput
from selfdoubt.members import Wrapped, count_rows, has_base_row
from selfdoubt.rows import expand, unfold
from selfdoubt.wrapping import innermost

#: Logits of a piece of prompt are at most this many numbers, whatever the vocabulary (128 MiB in float32).
_CHUNK = 2**25


class HFStepper:
    """A wrapped (or plain) Hugging Face causal language model with a key-value cache over all members.

    Args:
        model: The model.
        layers: Decoder layers whose hidden states come with the logits; 0 is the first.
        sizer: Sizer of the pieces in which prompts and texts are read; None reads as much at once as memory for the
            logits allows.
        probes: Probes of the positions that predict an answer's tokens: of a prompt the last one.
        fork: The layer at which members become rows, see ``late_fork``; None: the first of all.
        start: The first tokens that members read, see ``vote.Wrapper``; None takes the wrapper's.

    Raises:
        ConfigError: If the model has no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] = (),
        sizer: ChunkSizer | None = None,
        probes: Sequence[Probe] = (),
        fork: LateFork | Literal["late"] | None = "late",
        start: Literal["prompt", "answer"] | None = None,
    ) -> None:
        self._probes = list(probes)
        self._sizer = sizer
        self.members = count_rows(model)
        self.has_base = has_base_row(model)
        self._model = model
        measured = density.find_measured_leaf(model)
        # A distance that is pooled over positions is not one of a token.
        self._measured = measured if measured is not None and measured.is_fitted and not measured.pooled else None
        self._has_background = self._measured is not None and self._measured.has_background
        base = innermost(model)
        self._recorder = OutputRecorder([find_decoder_layer(base, layer) for layer in layers])
        self._products = find_products(model)
        self.config = base.config.get_text_config()  # type: ignore[union-attr, operator]
        self.device = next(base.parameters()).device
        self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._cache: Any = None
        self._mask: Tensor | None = None  #: of each sequence, whatever the number of its rows
        self._batch = 0
        start = start or getattr(getattr(model, "spec", None), "start", "prompt")
        self._shares_prompt = self.members > 1 and start == "answer"
        self._fork = find_late_fork(model, lambda fork: HFStepper(model, fork=fork)) if fork == "late" else fork

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    @property
    def context(self) -> int | None:
        """Most tokens in a sequence, or None."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Read left-padded prompts in pieces; yield (first column, logits). Exhaust it before ``step``.

        Raises:
            PromptError: If a prompt is empty or does not fit the context.
        """
        padded = self.begin(prompts)
        shared = self.count_shared(padded.shape[1])
        if shared:
            yield from self._pieces(padded[:, :shared], 0, probed=1, only_base=True)
            self._grow()
        for first, piece in self._pieces(padded[:, shared:], shared, probed=1):
            yield shared + first, piece

    def begin(self, prompts: Sequence[Sequence[int]]) -> Int[Tensor, "batch t"]:
        """Prepare to ``read`` prompts; return their ids, left-padded. Raises as ``start`` does."""
        width = max(len(p) for p in prompts)
        if not min(len(p) for p in prompts):
            raise PromptError("a prompt needs at least one token, got an empty one")
        if self.context is not None and width >= self.context:
            raise PromptError(
                f"the prompt has {width} tokens, and the model reads at most {self.context} with its answer; shorten it"
            )
        padded = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()
        # Without padding, models run faster (and just as right) when they are given no mask at all.
        self._mask = mask if min(len(p) for p in prompts) < width else None
        self._cache = None
        return padded

    def count_shared(self, width: int) -> int:
        """Return the number of a prompt's columns that are read as one row, because members read the answer only."""
        return width - 1 if self._shares_prompt else 0

    @torch.inference_mode()
    def read(self, ids: Int[Tensor, "batch t"], first: int, shared: int, keep: Callable[..., None]) -> StepOutput:
        """Read the next columns of prompts, from ``first`` on, and return the output at the last one.

        Args:
            ids: Token ids of these columns: all among the shared ones, or none.
            first: Number of columns that were read.
            shared: Number of columns that are read as one row, see ``count_shared``.
            keep: Function that gets logits, scale, states and signals of all that the model returned them for, see
                ``StepOutput``.
        """
        if not first:
            self._cache = None
        elif first == shared:
            self._grow()
        return self._forward(ids, first, 1, keep, only_base=first < shared).at(-1)

    def _grow(self) -> None:
        """Repeat what was read as one row for every member."""
        cache.grow_cache(self._cache, self._batch, self.members, 0 if self._fork is None else self._fork.first)

    @torch.inference_mode()
    def extend(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Append a text to every sequence, right-padded, in pieces; yield (first column, logits). No step can follow.

        Raises:
            PromptError: If a sequence does not fit the context.
        """
        before, width = self._cache.get_seq_length(), max(len(t) for t in texts)
        padded = torch.tensor([list(t) + [0] * (width - len(t)) for t in texts], device=self.device)
        lengths = torch.tensor([len(t) for t in texts], device=self.device)
        longest = int(((before if self._mask is None else self._mask.sum(1)) + lengths).max())
        if self.context is not None and longest > self.context:
            raise PromptError(
                f"prompt and text have {longest} tokens, and the model reads at most {self.context}; shorten them"
            )
        if min(len(t) for t in texts) < width or self._mask is not None:
            new = (torch.arange(width, device=self.device) < lengths[:, None]).long()
            old = new.new_ones(len(new), before) if self._mask is None else self._mask
            self._mask = torch.cat([old, new], dim=1)
        yield from self._pieces(padded, before)

    def _pieces(
        self, ids: Int[Tensor, "batch t"], before: int, probed: int | None = None, *, only_base: bool = False
    ) -> Iterator[tuple[int, StepOutput]]:
        """Read as many columns at a time as their logits fit; ``before`` columns are read already."""
        rows = len(ids) * (1 if only_base else self.members)
        largest, width, first = max(1, _CHUNK // (rows * self.config.vocab_size)), ids.shape[1], 0
        while first < width:
            columns = self.size_piece(rows, before + first, min(largest, width - first))
            piece = ids[:, first : first + columns]
            yield first, self._forward(piece, before + first, probed or columns, only_base=only_base)
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
        return self._forward(ids[:, None], first, 1).at(-1)

    @torch.inference_mode()
    def keep(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences of the batch; one that is named twice is kept twice."""
        index = torch.tensor(sequences, device=self.device)
        cache.select_sequences(self._cache, index, self._batch, self.members)
        self._batch = len(index)
        if self._mask is not None:
            self._mask = self._mask[index]
            self._trim()

    @torch.inference_mode()
    def join(self, other: HFStepper) -> None:
        """Add the sequences of another stepper of the same model behind this one's own.

        Raises:
            WrapError: If the model's cache is of a kind that cannot be joined.
        """
        mine, theirs = self.count_tokens(), other.count_tokens()
        self._cache = cache.join_caches(self._cache, other._cache, self._batch, other._batch)
        self._batch += other._batch
        width = self._cache.get_seq_length()
        used = torch.cat([mine, theirs])[:, None] > torch.arange(width - 1, -1, -1, device=self.device)
        self._mask = used.long()
        self._trim()

    @property
    def cache(self) -> Any:
        """The key-value cache; None before a prompt was read."""
        return self._cache

    @property
    def rows_per_sequence(self) -> int:
        """Rows per sequence that the model gets: one with a late fork, else one per member."""
        return self.members if self._fork is None else 1

    @property
    def base(self) -> nn.Module:
        """The model inside all wrappers."""
        return innermost(self._model)

    def count_tokens(self) -> Int[Tensor, " batch"]:
        """Return the number of tokens that each sequence has in the cache."""
        if self._mask is None:
            return torch.full((self._batch,), self._cache.get_seq_length(), device=self.device)
        return self._mask.sum(1)

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
        self,
        ids: Int[Tensor, "batch t"],
        first: int,
        probed: int,
        keep: Callable[..., None] | None = None,
        *,
        only_base: bool = False,
    ) -> StepOutput:
        """Run the model on these columns; probes read the last ``probed`` of them."""
        self._batch = len(ids)
        rows = 1 if only_base else self.rows_per_sequence
        inputs: dict[str, Any] = {"input_ids": expand(ids, rows), "past_key_values": self._cache, "use_cache": True}
        if self._mask is not None:
            mask = expand(self._mask[:, : first + ids.shape[1]], rows)
            inputs["attention_mask"] = mask
            if self.takes_positions:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, first:]
        with steady_attention(), use_products(self._products), self.probing(probed, only_base=only_base):
            result, self._cache = self.run_probed(inputs, keep, only_base=only_base)
        return result

    @contextmanager
    def probing(
        self, probed: int, places: Int[Tensor, " batch"] | None = None, *, only_base: bool = False
    ) -> Iterator[None]:
        """Let probes record the last ``probed`` positions while the block runs ``run_probed``."""
        with ExitStack() as stack:
            stack.enter_context(group_queries())
            if self._fork is not None and not only_base:
                stack.enter_context(self._fork.grow(self.members))
            if self._recorder.layers:
                stack.enter_context(self._recorder.record())
            for probe in self._probes:
                stack.enter_context(probe.capture(probed, places))
            yield

    def run_probed(
        self, inputs: Mapping[str, Any], keep: Callable[..., None] | None = None, *, only_base: bool = False
    ) -> tuple[StepOutput, Any]:
        """Run the model within a block of ``probing``; it can be compiled as one graph.

        Args:
            inputs: Inputs of the model, with ``rows_per_sequence`` rows per sequence, or one with ``only_base``.
            keep: Function that gets the output at all positions (see ``read``); then only that at the last is returned.
            only_base: All members are one row, without deviation or noise.

        Returns:
            Its output, and the cache that it filled.

        Raises:
            WrapError: If the model keeps no key-value cache.
        """
        if isinstance(self._model, Wrapped):
            # The first run after training or loading may find other weights than the one before.
            same_weights = inputs["past_key_values"] is not None
            output, scales = self._model.forward_rows(same_weights=same_weights, only_base=only_base, **inputs)
        else:
            output, scales = self._model(**inputs), None
        filled = getattr(output, "past_key_values", None)
        if filled is None:
            raise WrapError(f"{type(self._model).__name__} keeps no key-value cache, which decoding needs")
        logits = unfold(output.logits, 1 if only_base else self.members)
        batch, scale = logits.shape[1], None
        if scales is not None:
            assert isinstance(self._model, Wrapped)
            std = self._model.distribution.std((output.logits, scales.logits))
            scale = self.pick_answering(std, batch)
        states, captured = None, self._recorder.take()
        if captured:
            by_member = [self.pick_answering(h.detach(), batch) for h in captured]
            states = torch.stack([h.float().mean(0, keepdim=True) for h in by_member], -2)
        signals = self._measure(batch)
        if keep is not None:
            keep(logits, scale, states, signals)
            logits, signals = logits[:, :, -1:], {name: x[:, :, -1:] for name, x in signals.items()}
            scale, states = (None if x is None else x[:, :, -1:] for x in (scale, states))
        result = StepOutput(logits, scale, states, signals=signals, has_base=self.has_base and not only_base)
        for probe in self._probes:
            result = probe.read(result)
        return result, filled

    def _measure(self, batch: int) -> dict[str, Float[Tensor, "1 batch t"]]:
        """Return the densities of the positions that just ran: the base's where it answers, or the mean over members.

        The Gaussian of answers is the usual one of the measured leaf, and that of all tokens its background.
        """
        if self._measured is None:
            return {}
        rows = self.pick_answering(self._measured.read_features(), batch)
        usual = self._measured.usual(rows).mean(0, keepdim=True)
        if not self._has_background:
            return {"density": usual}
        background = self._measured.background(rows).mean(0, keepdim=True)
        return {"density": background, "relative_density": usual - background}

    def pick_answering(
        self, rows: Float[Tensor, "rows *rest"], batch: int | None = None
    ) -> Float[Tensor, "members batch *rest"]:
        """Return the rows of the members that answer: the base's alone where there is one, or where all are one.

        Args:
            rows: Rows of all members, or of one where they are one.
            batch: Number of sequences; None takes those that were read last.
        """
        members = unfold(rows, len(rows) // (batch or self._batch))
        return members[:1] if self.has_base else members
