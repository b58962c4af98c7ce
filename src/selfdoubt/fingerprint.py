"""Fingerprints of base models: an adapter loads onto the base that it was made for, and no other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from selfdoubt.rows import list_added_names

#: Largest relative change of a parameter's mean absolute value within one base: matrices may be read from 4 bits.
_VECTOR_TOLERANCE, _MATRIX_TOLERANCE = 0.01, 0.05


def compute_fingerprint(wrapped: nn.Module, elsewhere: Collection[str] = ()) -> dict[str, list[float]]:
    """Return mean absolute value and size of some frozen, unquantised parameters by name, to recognise a base.

    They are up to eight vectors, such as norms and biases, and up to eight larger ones. Rounding to another float type
    changes a mean by far less than the tolerance of ``find_difference``.
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
    return {name: [_size(frozen[name]), frozen[name].numel()] for name in sorted(chosen)}


def find_difference(wrapped: nn.Module, fingerprint: Mapping[str, Sequence[float]]) -> str | None:
    """Return the name of the first parameter that is not as in a fingerprint; None if it is the same base model.

    Matrices may be packed now, or have been rounded to a few bits, which changes their mean by some per cent.
    """
    parameters = dict(wrapped.named_parameters())
    for name, (size, numel) in fingerprint.items():
        p = parameters.get(name)
        if p is not None and not p.is_floating_point():
            continue
        if p is None or p.numel() != numel:
            return name
        if abs(_size(p) - size) > (_VECTOR_TOLERANCE if p.ndim <= 1 else _MATRIX_TOLERANCE) * abs(size):
            return name
    return None


def _size(p: Tensor) -> float:
    """Return the mean absolute value of up to about a million numbers, evenly spaced."""
    return float(p.detach().reshape(-1)[:: max(1, p.numel() >> 20)].double().abs().mean())
