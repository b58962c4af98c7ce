"""Fingerprints of base models: an adapter loads onto the base that it was made for, and no other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from selfdoubt.random_numbers import scramble
from selfdoubt.rows import list_added_names

#: Largest changes within one base, of vectors and of matrices, which may be read from 4 bits: of the mean absolute
#: value relative to itself, and of the alignment. Alignments of two unrelated matrices differ by about 1.8.
_SIZE_TOLERANCE = 0.01, 0.05
_ALIGNMENT_TOLERANCE = 0.05, 0.6
_READ = 2**20  #: numbers of a parameter that are read, evenly spaced


def compute_fingerprint(wrapped: nn.Module, elsewhere: Collection[str] = ()) -> dict[str, list[float]]:
    """Return three numbers by name of some frozen, unquantised parameters, to recognise a base.

    They are the mean absolute value, the number of numbers, and their alignment with signs that only depend on the
    place: ``sum(sign * w) / (sqrt(n) * mean(abs(w)))``, which other weights do not share, even if they are the same
    ones in another order. The parameters are up to eight vectors, such as norms and biases, and up to eight larger
    ones. Rounding to another float type changes the numbers by far less than the tolerance of ``find_difference``.
    """
    added = {*list_added_names(wrapped), *elsewhere}
    frozen = {
        name: p
        for name, p in wrapped.named_parameters()
        if name not in added and not p.requires_grad and p.is_floating_point()
    }
    vectors = [name for name, p in frozen.items() if p.ndim <= 1]
    larger = [name for name, p in frozen.items() if p.ndim > 1]
    chosen = {names[round(i * (len(names) - 1) / 7)] for names in (vectors, larger) if names for i in range(8)}
    return {name: _describe(frozen[name]) for name in sorted(chosen)}


def find_difference(wrapped: nn.Module, fingerprint: Mapping[str, Sequence[float]]) -> str | None:
    """Return the name of the first parameter that is not as in a fingerprint; None if it is the same base model.

    Matrices may be packed now, or have been rounded to a few bits. Older fingerprints lack the alignment.
    """
    parameters = dict(wrapped.named_parameters())
    for name, (size, numel, *alignment) in fingerprint.items():
        p = parameters.get(name)
        if p is not None and not p.is_floating_point():
            continue
        if p is None or p.numel() != numel:
            return name
        mine, kind = _describe(p), int(p.ndim > 1)
        if abs(mine[0] - size) > _SIZE_TOLERANCE[kind] * abs(size):
            return name
        if alignment and abs(mine[2] - alignment[0]) > _ALIGNMENT_TOLERANCE[kind]:
            return name
    return None


@cache
def _make_signs() -> Tensor:
    """Return 1 or -1 for each place; there can be twice as many numbers as are read, as they lie evenly."""
    return ((scramble(torch.arange(2 * _READ)) & 1) * 2 - 1).to(torch.int8)


def _describe(p: Tensor) -> list[float]:
    """Return mean absolute value, number of numbers and alignment."""
    values = p.detach().reshape(-1)[:: max(1, p.numel() // _READ)].double()
    size = float(values.abs().mean())
    signs = _make_signs()[: len(values)].to(p.device)
    alignment = float((signs * values).sum()) / (len(values) ** 0.5 * size) if size else 0.0
    return [size, p.numel(), alignment]
