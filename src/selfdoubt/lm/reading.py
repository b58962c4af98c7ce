"""Reads prompts, with logits only at the places whose tokens are scored: the head costs as much as many layers.

While the trunk runs on a large piece, a tap at the head keeps the hidden states of these places, and lets the head run
on the last column only. Then the head runs on the places, some at a time. Where it cannot run by itself, because it
belongs to whole rows (members in it, a predicted scale) or because the model changes logits behind it (a soft cap), it
runs within the model on all columns with such a place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfdoubt.compat import get_output_head
from selfdoubt.density import MeasuredLeaf
from selfdoubt.lm.step_output import StepOutput, Stepper
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.members import Wrapped
from selfdoubt.rows import Replacement
from selfdoubt.wrapping import innermost

#: Hidden states within a layer, and logits that a model returns, are at most this many numbers at a time.
_CHUNK = 2**25
#: Bytes of logits that a head computes at a time by itself on a CPU: few enough to be allocated without new pages.
_BLOCK = 2**24

#: How a head runs: by itself on places, within the model on columns, or within it on everything.
HeadRun = Literal["apart", "columns", "whole"]
#: How the heads of models were seen to run.
_RUNS: WeakKeyDictionary[nn.Module, HeadRun] = WeakKeyDictionary()


class Block(NamedTuple):
    """Output at some places of prompts."""

    sequences: Int[Tensor, " n"]  #: sequence of each place, on the host
    columns: Int[Tensor, " n"]  #: column of each place, counted from the first of the left-padded prompts, on the host
    output: StepOutput  #: logits, scales and signals, ``(members, n, ...)``


class PromptPiece(NamedTuple):
    """A piece of prompts that was read: some columns of all sequences."""

    first: int
    columns: int
    states: Float[Tensor, "1 batch t layers width"] | None
    blocks: Iterator[Block]  #: to be read before the next piece
    last: StepOutput  #: output at the last column, ``(members, batch, ...)``


def read_prompts(
    stepper: Stepper, prompts: Sequence[Sequence[int]], places: Bool[Tensor, "batch width"]
) -> Iterator[PromptPiece]:
    """Read left-padded prompts in pieces; any stepper can read so, and only ``HFStepper`` leaves out logits.

    Args:
        stepper: A stepper without sequences in progress.
        prompts: Token ids of each prompt.
        places: Columns of each left-padded prompt where logits are needed; on the host. The last column has some in any
            case.

    Raises:
        PromptError: If a prompt is empty or does not fit the context.
    """
    _keep_freed_memory()
    tap = HeadTap(stepper) if isinstance(stepper, HFStepper) else None
    if tap is None or tap.run == "whole":
        for first, output in stepper.start(prompts):
            columns = output.logits.shape[2]
            chosen = places[:, first : first + columns]
            run = _RunOutput(output.logits, output.scale, output.states, output.signals)
            blocks = _select(run, chosen, first, range(columns), has_base=output.has_base)
            yield PromptPiece(first, columns, output.states, blocks, output.at(-1))
        return
    assert isinstance(stepper, HFStepper)
    yield from _read_with_tap(stepper, tap, prompts, places)


def _read_with_tap(
    stepper: HFStepper, tap: HeadTap, prompts: Sequence[Sequence[int]], places: Bool[Tensor, "batch width"]
) -> Iterator[PromptPiece]:
    ids = stepper.begin(prompts)
    first, width = 0, ids.shape[1]
    shared = stepper.count_shared(width)
    while first < width:
        is_shared = first < shared
        rows = len(ids) * (1 if is_shared else stepper.members)
        left = places[:, first : shared if is_shared else width]
        columns = stepper.size_piece(rows, first, tap.count_columns(rows, left))
        chosen = left[:, :columns]
        with tap.capture(chosen, only_base=is_shared):
            output = stepper.read(ids[:, first : first + columns], first, shared, tap.keep)
        if tap.update():
            yield PromptPiece(first, columns, tap.states, tap.blocks(first), output)
            first += columns


class _RunOutput(NamedTuple):
    """The output of one run, see ``StepOutput``, where logits and scale may be there for some columns only."""

    logits: Tensor
    scale: Tensor | None
    states: Tensor | None
    signals: Mapping[str, Tensor]


class HeadTap:
    """A tap at the head of a stepper's model.

    Args:
        stepper: The stepper.
    """

    def __init__(self, stepper: HFStepper) -> None:
        base = innermost(stepper.model)
        head = get_output_head(base)
        while isinstance(head, MeasuredLeaf):  # a density changes nothing of its layer
            head = head.leaf
        self._stepper = stepper
        self._members, self._has_base = stepper.members, stepper.has_base  # of the piece
        self._base, self._head = base, head
        config = base.config.get_text_config()  # type: ignore[union-attr, operator]
        hidden = getattr(config, "hidden_size", 1)
        inside = getattr(config, "intermediate_size", None) or 1
        self._widths: tuple[int, int] = max(4 * hidden, inside), config.vocab_size
        #: How the head runs; None until it is seen.
        self.run: HeadRun | None = "whole" if head is None or _is_compiled(stepper.model) else _RUNS.get(base)
        if isinstance(head, Replacement) and self.run is None:
            self.run = "columns"
        self._places = torch.zeros(0, 0, dtype=torch.bool)
        self._kept: Tensor | None = None  # hidden states of the places
        self._logits: Tensor | None = None  # the head's output
        self._whole: _RunOutput | None = None
        self._columns: list[int] = []  # of the logits that the model returned

    def count_columns(self, rows: int, places: Bool[Tensor, "batch t"]) -> int:
        """Return the number of columns of these that memory allows to read at once."""
        width, classes = self._widths
        left = places.shape[1]
        most = max(1, _CHUNK // (rows * width))
        few = max(1, _CHUNK // (rows * classes))
        if self.run == "apart":
            return min(most, left)
        if self.run == "columns":
            # One more than the columns with places: the last one always has logits.
            fits = int((places.any(0).cumsum(0) + 1 <= few).sum())
            return min(most, left, max(1, fits))
        return min(most, few, left)

    @contextmanager
    def capture(self, places: Bool[Tensor, "batch t"], *, only_base: bool = False) -> Iterator[None]:
        """Keep what the head sees at these places while the model runs within the block.

        With ``only_base`` all members are one row.
        """
        self._members = 1 if only_base else self._stepper.members
        self._has_base = self._stepper.has_base and not only_base
        self._places, self._kept, self._logits, self._whole = places, None, None, None
        t = places.shape[1]
        self._columns = list(range(t))
        thread = threading.get_ident()  # another thread may run the same model

        def choose(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if threading.get_ident() != thread:
                return None
            hidden = inputs[0] if inputs else None
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[1] != t or self.run == "whole":
                return None
            if self.run == "columns":
                self._columns = sorted({*places.any(0).nonzero().flatten().tolist(), t - 1})
                chosen = hidden[:, self._columns]
            else:
                sequences, columns = self._find(hidden.device)
                by_member = hidden.unflatten(0, (self._members, -1))  # type: ignore[no-untyped-call]
                self._kept = by_member[:, sequences, columns]
                self._columns = [t - 1]
                chosen = hidden[:, -1:]
            # A product of one row with the strides of a longer tensor, which ``contiguous`` keeps, takes 80 times as
            # long on a CPU in bfloat16; of other strided inputs a linear layer copies its weights once per row.
            return (chosen.clone(memory_format=torch.contiguous_format), *inputs[1:])

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                self._logits = output

        assert self._head is not None
        handles = [self._head.register_forward_pre_hook(choose), self._head.register_forward_hook(keep)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, logits: Tensor, scale: Tensor | None, states: Tensor | None, signals: Mapping[str, Tensor]) -> None:
        """Keep the output of a run, whose logits may be those of some columns only."""
        self._whole = _RunOutput(logits, scale, states, signals)

    def update(self) -> bool:
        """Take note of how the head can run; return False if the run that was captured has to be made again."""
        assert self._whole is not None
        if self.run is not None:
            return True
        logits, direct = self._whole.logits.flatten(0, 1), self._logits
        if self._kept is None or not isinstance(direct, Tensor):
            self.run = "whole"  # the head was not called in the usual way, and all logits are there
        elif (
            self._whole.scale is None and direct.shape == logits.shape and torch.equal(direct.to(logits.dtype), logits)
        ):
            self.run = "apart"
        else:
            self.run = "columns"
        _RUNS[self._base] = self.run
        return self.run != "columns"

    @property
    def states(self) -> Float[Tensor, "1 batch t layers width"] | None:
        """Hidden states of decoder layers at all columns of the piece, see ``StepOutput``."""
        assert self._whole is not None
        return self._whole.states

    def blocks(self, first: int) -> Iterator[Block]:
        """Return the output at the places of a piece whose first column is ``first``."""
        assert self._whole is not None
        if self._kept is None:
            inside = self._places[:, self._columns]
            return _select(self._whole, inside, first, self._columns, has_base=self._has_base)
        return self._run_head(first)

    def _run_head(self, first: int) -> Iterator[Block]:
        whole, kept, head = self._whole, self._kept, self._head
        assert whole is not None
        assert kept is not None
        assert head is not None
        sequences, columns = self._find(torch.device("cpu"))
        size, numbers = _CHUNK // (self._members * self._widths[1]), whole.logits.element_size()
        if kept.device.type == "cpu":
            size = _BLOCK // (self._members * self._widths[1] * numbers)
        for start in range(0, len(sequences), max(32, size)):
            span = slice(start, start + max(32, size))
            hidden = kept[:, span]
            with torch.inference_mode():
                logits = head(hidden.flatten(0, 1)[None])[0].to(whole.logits.dtype)
            at = sequences[span].to(kept.device), columns[span].to(kept.device)
            output = StepOutput(
                logits.unflatten(0, hidden.shape[:2]),
                signals={name: x[:, at[0], at[1]] for name, x in whole.signals.items()},
                has_base=self._has_base,
            )
            yield Block(sequences[span], first + columns[span], output)

    def _find(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the sequence and the column within the piece of each place."""
        sequences, columns = self._places.nonzero(as_tuple=True)
        return sequences.to(device), columns.to(device)


def _select(
    run: _RunOutput, places: Bool[Tensor, "batch k"], first: int, columns: Sequence[int], *, has_base: bool
) -> Iterator[Block]:
    """Yield the output at places among the logits of a run; ``columns`` are those of the logits within the piece."""
    sequences, at = places.nonzero(as_tuple=True)
    if not len(sequences):
        return
    column, device = torch.tensor(columns)[at], run.logits.device
    row, place, within = sequences.to(device), at.to(device), column.to(device)
    signals = {
        # A density within the head sees no more columns than the logits have.
        name: x[:, row, place if x.shape[2] == len(columns) else within]
        for name, x in run.signals.items()
    }
    scale = None if run.scale is None else run.scale[:, row, place]
    yield Block(
        sequences, first + column, StepOutput(run.logits[:, row, place], scale, signals=signals, has_base=has_base)
    )


def _is_compiled(model: nn.Module) -> bool:
    """Return whether a model runs as one graph, which a tap would break."""
    return any(bool(module.spec.compile) for module in model.modules() if isinstance(module, Wrapped))


def _keep_freed_memory() -> None:
    """Let tensors of up to 31 MiB on a CPU reuse freed memory, by allocating one and never touching it.

    The C library returns larger blocks than any that was freed before to the system; new ones then cost a page fault
    per 4 KiB, which takes ten times as long as a softmax over it.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
