"""Batches of training examples: the sampler that groups rows by length, packing, collation and loaders.

An optimiser step takes ``batch_size * accumulate * devices`` rows of about the same length, padded to a multiple of
``pad_to`` tokens. Each batch knows how many
tokens count in its whole step, so that every token of a step weighs the same, in whichever way its
rows are split over members, accumulated batches and devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from selfdoubt.errors import ConfigError
from selfdoubt.train.config import TrainConfig
from selfdoubt.train.devices import choose_padding

#: Rows are sorted by length within this many steps: long enough for little padding, short enough for good shuffling.
STEPS_SORTED_TOGETHER = 16


class Batch(NamedTuple):
    """Rows padded on the right. With packing a row holds several examples, and ``segments`` numbers them from 1."""

    ids: Int[Tensor, "rows t"]
    positions: Int[Tensor, "rows t"]
    segments: Int[Tensor, "rows t"]  #: 0 is padding
    labels: Int[Tensor, "rows t"]  #: the next token where it counts, else -100
    chosen: Int[Tensor, " n"]  #: positions that count, row after row: indices into ``labels.flatten()``
    step_tokens: int  #: tokens that count in the whole step, over all its batches and devices
    packed: bool

    def mask(self) -> Bool[Tensor, "rows 1 t t"] | None:
        """Return the attention mask: with packing a square per row, else None.

        Padding on the right needs no mask in a causal model: no token sees what follows it. Without one, attention
        runs its fastest kernels.
        """
        if not self.packed:
            return None
        same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        return same & torch.ones_like(same[0, 0]).tril()

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments > 0).sum())


class BatchRows(NamedTuple):
    """Indices of the examples in each row of a batch, and the number of tokens that count in their step."""

    rows: list[list[int]]
    step_tokens: int
    width: int  #: tokens in a row, with its padding
    packed: bool


class StepSampler(Sampler[BatchRows]):
    """The batches of one device, in an order that depends on the seed and the epoch only.

    Args:
        lengths: Number of tokens of each example.
        counted: Tokens of each example that count in the loss.
        config: Sizes, seed, and the groups of a batch; the same rows go to the same group on any number of devices.
        rank: Number of this device.
        world: Number of devices.

    Raises:
        ConfigError: If the examples do not fill one step.
    """

    def __init__(
        self,
        lengths: Tensor,
        counted: Tensor,
        config: TrainConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.lengths, self.counted, self.config = lengths, counted, config
        self.rank, self.world = rank, world
        self.padding = choose_padding(config)
        self.epoch = 0
        self.start = 0  #: batches of the epoch that were done before the run was cut off
        self.rows_per_step = config.rows * config.accumulate * world
        self.batches = len(self._steps(0)) * config.accumulate
        if not self.batches:
            raise ConfigError(
                f"a step takes {self.rows_per_step} rows, and there are {len(self._rows(0))}; lower batch_size or "
                "accumulate, or give more data"
            )

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[BatchRows]:
        micro = self.config.rows // self.config.groups
        start, self.start = self.start, 0
        number = 0
        for step in self._steps(self.epoch)[: self.batches // self.config.accumulate]:
            total = int(sum(self.counted[row].sum() for row in step))
            # (groups, accumulate * world, rows): splitting a step never moves a row to another group.
            size = len(step) // self.config.groups
            groups = [step[first : first + size] for first in range(0, len(step), size)]
            for k in range(self.config.accumulate):
                if number >= start:
                    first = (k * self.world + self.rank) * micro
                    rows = [row for group in groups for row in group[first : first + micro]]
                    yield BatchRows(rows, total, self._width(rows), self.config.pack)
                number += 1

    def _width(self, rows: list[list[int]]) -> int:
        if self.config.pack:
            return self.config.max_length
        longest = max(int(self.lengths[row].sum()) for row in rows)
        return round_up(longest, self.padding, self.config.max_length)

    def _steps(self, epoch: int) -> list[list[list[int]]]:
        """Return the rows of each whole step; those that fill none are left to another epoch's order."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        rows = self._rows(epoch)
        together = self.rows_per_step * STEPS_SORTED_TOGETHER
        steps = []
        for first in range(0, len(rows), together):
            part = sorted(rows[first : first + together], key=lambda row: -int(self.lengths[row].sum()))
            steps += [part[i : i + self.rows_per_step] for i in range(0, len(part), self.rows_per_step)]
        steps = [step for step in steps if len(step) == self.rows_per_step]
        shuffled = [steps[int(i)] for i in torch.randperm(len(steps), generator=generator)]
        # Within a step rows are sorted: dealt out in turn, so that no group has all the long ones.
        return [[row for m in range(self.config.groups) for row in step[m :: self.config.groups]] for step in shuffled]

    def _rows(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.config.seed + 1) * 7_368_787 + epoch)
        order = [int(i) for i in torch.randperm(len(self.lengths), generator=generator)]
        if not self.config.pack:
            return [[i] for i in order]
        return pack_rows(order, self.lengths, self.config.max_length)


def pack_rows(order: Sequence[int], lengths: Tensor, width: int) -> list[list[int]]:
    """Put examples into rows of at most ``width`` tokens: each into the first of the last rows that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        length = int(lengths[i])
        recent = range(max(0, len(rows) - 64), len(rows))
        fits = next((r for r in recent if room[r] >= length), None)
        if fits is None:
            rows.append([i])
            room.append(width - length)
        else:
            rows[fits].append(i)
            room[fits] -= length
    return rows


def round_up(length: int, multiple: int, limit: int) -> int:
    """Return the least multiple that holds a length, but no more than the limit, which the model may not read past."""
    return min(-(-length // multiple) * multiple, max(limit, length))


class BatchDataset(Dataset[Batch]):
    """A data set of batches by a sampler's rows. Texts stay in memory-mapped files, which workers share."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples.with_format(None)

    def __getitem__(self, rows: BatchRows) -> Batch:
        """Return the tensors of some rows."""
        examples = [[self.examples[i] for i in row] for row in rows.rows]
        return collate(examples, rows.step_tokens, rows.width, packed=rows.packed)


def collate(
    rows: Sequence[Sequence[Any]], step_tokens: int, width: int | None = None, *, packed: bool = False
) -> Batch:
    """Return the tensors of rows of examples, padded on the right to ``width``; None pads to the longest row."""
    width = width or max(sum(len(e["ids"]) for e in row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            tokens = torch.tensor(example["ids"])
            end = start + len(tokens)
            ids[r, start:end], segments[r, start:end] = tokens, number
            positions[r, start:end] = torch.arange(len(tokens))
            predicted = torch.tensor(example["counts"])[1:]
            labels[r, start : end - 1] = tokens[1:].where(predicted, -100)
            start = end
    # Found here, on the CPU: to find them on a GPU would wait for all that runs there.
    chosen = (labels.flatten() >= 0).nonzero().flatten()
    return Batch(ids, positions, segments, labels, chosen, step_tokens, packed)


def build_loader(examples: Any, sampler: Sampler[BatchRows], workers: int) -> DataLoader[Batch]:
    """Build a loader of a sampler's batches, read by ``workers`` processes next to the one that trains."""
    return DataLoader(
        BatchDataset(examples),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # so that starting workers draws nothing from the noise's random numbers
    )


class LengthSortedSampler(Sampler[BatchRows]):
    """Sampler of validation batches, sorted by length: every example once, equally many batches on each device."""

    def __init__(
        self, lengths: Tensor, batch_size: int, *, rank: int = 0, world: int = 1, padding: int = 1, limit: int = 0
    ) -> None:
        self.lengths, self.padding, self.limit = lengths, padding, limit
        # The longest first, so that a lack of memory shows at once.
        order = [int(i) for i in torch.argsort(lengths, descending=True, stable=True)]
        largest = -(-len(order) // world)
        # Collective operations count on equal numbers; at least two rows a batch, so that none is empty.
        batches = -(-largest // max(batch_size, 2))
        self.batches = torch.tensor(order[rank::world]).tensor_split(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[BatchRows]:
        for batch in self.batches:
            width = round_up(int(self.lengths[batch].max()), self.padding, self.limit)
            yield BatchRows([[int(i)] for i in batch], 0, width, packed=False)
