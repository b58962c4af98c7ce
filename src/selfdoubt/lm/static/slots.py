"""A static key-value cache in slots: each sequence has a slot for every member, and a position of its own in it.

The tensors keep their shapes and addresses from step to step, so that a step can be compiled or captured as a CUDA
graph. ``rows = members * slots``, member-major, as everywhere. A sequence starts at column 0 of its slot; columns
beyond its position are masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.compat import build_cache, find_cache_window

#: Columns of the smallest cache.
FIRST_LENGTH = 256
#: Sizes from which buckets grow by half, too: below, they double.
DOUBLED_SLOTS, DOUBLED_LENGTH = 8, 1024
_VERSIONS = itertools.count()
#: Slots for which there is room in the tensors of one number per slot.
_ROOM = 256


def choose_bucket(needed: int, first: int, doubled: int, most: int | None = None) -> int:
    """Return the smallest bucket of at least this size: ``first`` times 1, 2, 4, ..., later also 1.5 times these.

    Args:
        needed: Size that must fit.
        first: The smallest bucket.
        doubled: Size from which there is a bucket halfway between two powers.
        most: The largest bucket; None without a limit.

    Example:
        >>> [choose_bucket(n, 1, 8) for n in (1, 3, 9, 13, 17)]
        [1, 4, 12, 16, 24]
    """
    size = first
    while size < needed:
        half = size + size // 2
        if size >= doubled and needed <= half:
            size = half
            break
        size *= 2
    return size if most is None else min(size, most)


class _Layout:
    """The size of a cache, and the columns that a step writes to; layers share it."""

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        self.slots, self.length, self.device = slots, length, device
        self.version = next(_VERSIONS)
        self.columns = torch.zeros(slots, dtype=torch.long, device=device)
        self.index: dict[int, Tensor] = {}

    def index_rows(self, rows: int) -> Int[Tensor, "rows 1 1 1"]:
        """Return the column that each row of a layer writes to."""
        if rows not in self.index:
            self.index[rows] = self.columns.repeat(rows // self.slots).view(-1, 1, 1, 1)
        return self.index[rows]


class SlotLayer:
    """The keys and values of one layer of a model, as Hugging Face's attention updates and reads them.

    ``compat.build_cache`` registers it as a ``transformers.cache_utils.CacheLayerMixin``.

    Args:
        layout: Layout of the cache that it belongs to.
        heads: Key-value heads.
        widths: Features of a key, and of a value.
        members: Rows per slot, which may differ from layer to layer.
        window: Largest number of positions that attention reads; None without a limit.
        dtype: Type of the keys and values.
    """

    is_compileable = is_initialized = True
    is_croppable = supports_early_init = False

    def __init__(
        self,
        layout: _Layout,
        heads: int,
        widths: tuple[int, int],
        members: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> None:
        self._layout, self._heads, self._widths, self._dtype = layout, heads, widths, dtype
        self.members, self.window, self.is_sliding = members, window, window is not None
        self._storage: tuple[Tensor, ...] = ()
        self.keys: Tensor
        self.values: Tensor
        self.allocate()

    def allocate(self) -> None:
        """Lay out zeroed keys and values of the cache's size, in the memory that is there if it is enough.

        Where it is not, the cache gets a new ``version``. Zeros matter: a masked column that holds NaN would spread it.
        """
        rows, length = self.members * self._layout.slots, self._layout.length
        sizes = [rows * self._heads * length * width for width in self._widths]
        if not self._storage or self._storage[0].numel() < sizes[0]:
            # The old memory goes before the new one comes.
            self._storage = ()
            self.keys = self.values = torch.empty(0)
            self._layout.version = next(_VERSIONS)
            self._storage = tuple(torch.zeros(size, dtype=self._dtype, device=self._layout.device) for size in sizes)
        else:
            for storage in self._storage:
                storage.zero_()
        self.keys, self.values = (
            storage[:size].view(rows, self._heads, length, width)
            for storage, size, width in zip(self._storage, sizes, self._widths, strict=True)
        )

    @property
    def bytes(self) -> int:
        """Bytes of memory that the layer holds."""
        return sum(storage.nbytes for storage in self._storage)

    def by_slot(self) -> tuple[Tensor, Tensor]:
        """Return views of keys and values, ``(members, slots, heads, length, width)``."""
        return self._split(self.keys), self._split(self.values)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(self.members, -1, *x.shape[1:])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the tensors are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write each row's key and value at the row's own position; return those of all columns."""
        index = self._layout.index_rows(len(key_states))
        self.keys.scatter_(2, index.expand(key_states.shape), key_states)
        self.values.scatter_(2, index.expand(value_states.shape), value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of columns that a mask extends over, and the first one."""
        return self._layout.length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns: each row uses a number of its own."""
        return self._layout.length

    def get_max_length(self) -> int:
        """Return the number of columns."""
        return self._layout.length


class SlotCache:
    """Keys and values of all layers in slots, and the position of each slot's next token.

    Args:
        slots: Sequences that fit.
        length: Columns of each slot.
        device: Device of the tensors.
    """

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        self._layout = _Layout(slots, length, device)
        self.layers: list[SlotLayer | None] = []  #: None for a layer that keeps nothing of its own
        self._positions = torch.zeros(max(_ROOM, slots), dtype=torch.long, device=device)

    @classmethod
    def like(cls, dynamic: Any, batch: int, slots: int, length: int) -> SlotCache:
        """Build an empty cache for the layers of another one, which holds ``batch`` sequences."""
        first = next(layer for layer in dynamic.layers if layer.keys is not None)
        cache = cls(slots, length, first.keys.device)
        for layer in dynamic.layers:
            if layer.keys is None:
                cache.layers.append(None)
                continue
            rows, heads, _, width = layer.keys.shape
            widths = (width, layer.values.shape[-1])
            window = find_cache_window(layer)
            cache.layers.append(SlotLayer(cache._layout, heads, widths, rows // batch, window, layer.keys.dtype))
        return cache

    @property
    def slots(self) -> int:
        """Sequences that fit."""
        return self._layout.slots

    @property
    def length(self) -> int:
        """Columns of each slot."""
        return self._layout.length

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self._layout.device

    @property
    def version(self) -> int:
        """A number that no other cache has, nor this one with its tensors elsewhere."""
        return self._layout.version

    @property
    def positions(self) -> Int[Tensor, " slots"]:
        """The column of each slot's next token."""
        return self._positions[: self.slots]

    @property
    def kept(self) -> list[SlotLayer]:
        """The layers that keep keys and values."""
        return [layer for layer in self.layers if layer is not None]

    @property
    def windows(self) -> list[int | None]:
        """The windows of the layers that keep keys and values."""
        return [layer.window for layer in self.kept]

    @property
    def bytes(self) -> int:
        """Bytes of memory that the keys and values hold."""
        return sum(layer.bytes for layer in self.kept)

    def present(self) -> Any:
        """Return the cache as Hugging Face models take it, as ``past_key_values``."""
        return build_cache(self.layers)

    def begin_step(self) -> Int[Tensor, " slots"]:
        """Fix the columns that the step's keys and values go to; return them.

        A sequence that has ended may have no column left: it stays at its last one.
        """
        self._layout.index = {}
        self._layout.columns = self.positions.clamp_max(self.length - 1)
        return self._layout.columns

    def build_mask(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "slots 1 1 length"]:
        """Build the summand of attention's scores: 0 up to each slot's position, within the window, else -inf."""
        columns, last = torch.arange(self.length, device=self.device), self._layout.columns[:, None]
        hidden = columns > last
        if window is not None:
            hidden = hidden | (columns <= last - window)
        mask = torch.zeros(self.slots, self.length, dtype=dtype, device=self.device)
        return mask.masked_fill(hidden, -torch.inf)[:, None, None]

    def admit(self, dynamic: Any, lengths: Sequence[int], slots: Sequence[int]) -> None:
        """Copy the sequences of a right-aligned dynamic cache into these slots; the dynamic cache is emptied.

        Args:
            dynamic: The cache, with ``len(lengths)`` sequences of all members.
            lengths: Number of tokens of each sequence; the columns before them are padding.
            slots: A slot for each.
        """
        counts = torch.tensor(lengths, device=self.device)
        places = torch.tensor(slots, device=self.device)
        for layer, old in zip(self.layers, dynamic.layers, strict=True):
            if layer is None:
                continue
            for name, target in zip(("keys", "values"), layer.by_slot(), strict=True):
                aligned = _align_left(getattr(old, name), layer.members, counts, max(lengths))
                target[:, places, :, max(lengths) :] = 0
                target[:, places, :, : max(lengths)] = aligned
                setattr(old, name, None)
        self.positions[places] = counts

    def copy_from(self, other: SlotCache, sources: Sequence[int], slots: Sequence[int]) -> None:
        """Copy sequences of another cache of the same model, or of this one, into these slots, where they fit."""
        origin = torch.tensor(sources, device=self.device)
        places = torch.tensor(slots, device=self.device)
        columns = min(self.length, other.length)
        for layer, old in zip(self.kept, other.kept, strict=True):
            for target, source in zip(layer.by_slot(), old.by_slot(), strict=True):
                target[:, places, :, columns:] = 0
                target[:, places, :, :columns] = source[:, origin, :, :columns]
        self.positions[places] = other.positions[origin]

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        """Change the size; the sequences of the slots ``kept`` move to the first slots, in this order."""
        origin = torch.tensor(kept, device=self.device, dtype=torch.long)
        columns, positions = min(self.length, length), self.positions[origin]
        self._layout.slots, self._layout.length = slots, length
        for layer in self.kept:
            moved = [x[:, origin, :, :columns] for x in layer.by_slot()]
            layer.allocate()
            for target, source in zip(layer.by_slot(), moved, strict=True):
                target[:, : len(kept), :, :columns] = source
        if len(self._positions) < slots:
            self._layout.version = next(_VERSIONS)
            self._positions = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._positions.zero_()
        self.positions[: len(kept)] = positions


def _align_left(
    x: Float[Tensor, "rows heads t width"], members: int, counts: Int[Tensor, " batch"], length: int
) -> Float[Tensor, "members batch heads length width"]:
    """Return right-aligned sequences left-aligned, with zeros behind them.

    A sliding window keeps only the last columns of a sequence: they come to their places, with zeros before them.
    """
    by_member, t = x.view(members, len(counts), *x.shape[1:]), x.shape[2]
    columns = torch.arange(length, device=x.device)
    source = columns + t - counts[:, None]  # column of the old cache for each sequence and new column
    unused = (source < 0) | (source >= t)
    index = source.clamp(0, t - 1)[None, :, None, :, None]
    gathered = by_member.gather(3, index.expand(*by_member.shape[:3], length, by_member.shape[-1]))
    return gathered.masked_fill(unused[None, :, None, :, None], 0)
