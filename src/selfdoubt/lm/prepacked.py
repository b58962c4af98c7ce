"""Prepacked linear layers: copies of their weights in the blocked layout of oneDNN, for steps of few rows on a CPU.

A product of a token's few rows reads all weights once, and PyTorch's own layout cannot be read at the memory's
bandwidth. In oneDNN's layout the product of one to five rows takes 0.35 to 0.9 of the time in bfloat16, to the same
bits, and 0.12 to 0.8 in float32, equal up to rounding. The copies take as much memory as the weights; the weights
stay as they are, for everything else. A copy is made at the first product; at each prompt the weights are compared with
what they were then.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from threading import Lock
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selfdoubt.lm.hardware import read_cpu_memory
from selfdoubt.members import Wrapped
from selfdoubt.rows import is_autocasting
from selfdoubt.wrapping import innermost

#: Most rows of a product that takes the copy. Beyond, the usual product is nearly as fast in bfloat16; in float32 it
#: compiles nothing, where oneDNN keeps a kernel for each number of rows.
MOST_ROWS = {torch.bfloat16: 128, torch.float32: 32}
#: Share of the free memory that copies may take by default.
MEMORY_SHARE = 0.25
_LOG = logging.getLogger("selfdoubt")
_LOCK = Lock()
_CHOICES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  #: by model: are its layers prepacked
_PRODUCTS: WeakKeyDictionary[nn.Module, PrepackedProduct] = WeakKeyDictionary()  #: by layer
_WEIGHTS: WeakValueDictionary[int, PrepackedWeight] = WeakValueDictionary()  #: by the id of the parameter
#: Functions of torch that its own compiler calls; looked up at their use, as another build may lack them.
_find_reorder = attrgetter("mkldnn._reorder_linear_weight.default")
_find_multiply = attrgetter("mkldnn._linear_pointwise.default")
_find_bf16_check = attrgetter("mkldnn._is_mkldnn_bf16_supported.default")
_get_version = attrgetter("_version")


class PrepackedWeight:
    """A weight and its copy in the layout of oneDNN, which all layers share that have the weight.

    Args:
        weight: The parameter of a linear layer that ``can_prepack``.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._copy: Tensor | None = None
        self._state: tuple[int, ...] = ()  # of the weight when it was copied

    @property
    def has_copy(self) -> bool:
        """True if the copy is made."""
        return self._copy is not None

    def read(self) -> Tensor:
        """Return the copy, which is made first where there is none."""
        copy = self._copy
        if copy is None:
            with _LOCK, torch.no_grad():
                copy = self._copy  # another thread may have made it
                if copy is None:
                    self._state = _describe(self.weight)
                    self._copy = copy = _find_reorder(torch.ops)(self.weight.detach())
        return copy

    def refresh(self) -> None:
        """Drop the copy if the weight has changed since: the next product makes another."""
        if self._copy is not None and _describe(self.weight) != self._state:
            self._copy = None


class PrepackedProduct:
    """The product of a linear layer, with a prepacked weight where there are few rows.

    It is the layer's ``forward`` without the layer, so that the layer can go. A copy of it has no prepacked weight yet.

    Args:
        weight: The layer's weight.
        bias: The layer's bias.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias, self._most = bias, MOST_ROWS[weight.dtype]
        with _LOCK:
            known = _WEIGHTS.get(id(weight))
            self._prepacked = PrepackedWeight(weight) if known is None else known
            _WEIGHTS[id(weight)] = self._prepacked
        self._multiply = _find_multiply(torch.ops)

    def __reduce__(self) -> tuple[type[PrepackedProduct], tuple[Tensor, Tensor | None]]:
        """Return what copies need; a layout of oneDNN cannot be copied."""
        return PrepackedProduct, (self._prepacked.weight, self._bias)

    @property
    def prepacked(self) -> PrepackedWeight:
        """The weight and its copy."""
        return self._prepacked

    def __call__(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Return ``F.linear`` of the layer's parameters."""
        weight = self._prepacked.weight
        is_plain = (
            x.dtype == weight.dtype
            and 0 < x.numel() <= self._most * x.shape[-1]
            and not torch.is_grad_enabled()
            and not is_autocasting(x)
        )
        if not is_plain:
            return F.linear(x, weight, self._bias)
        y: Tensor = self._multiply(x.contiguous(), self._prepacked.read(), self._bias, "none", [], "")
        return y

    def is_of(self, layer: nn.Linear) -> bool:
        """Return True if the layer still has the parameters of the product, in the type that they had."""
        weight = self._prepacked.weight
        return layer.weight is weight and layer.bias is self._bias and self._most == MOST_ROWS[weight.dtype]


def set_prepacking(model: nn.Module, choice: bool | None) -> None:
    """Choose if a model's steps on a CPU keep prepacked copies of its linear layers' weights.

    Args:
        model: A model, wrapped or not.
        choice: None does where the copies take at most ``MEMORY_SHARE`` of the memory that is free at the first step.
    """
    base = innermost(model)
    _CHOICES.pop(base, None)
    if choice is not None:
        _CHOICES[base] = choice
    if choice is False:
        with _LOCK:
            for layer in base.modules():
                _PRODUCTS.pop(layer, None)


def find_products(model: nn.Module) -> Mapping[nn.Module, PrepackedProduct]:
    """Return the products that may take the place of linear layers; none where copies would take too much memory."""
    layers = find_linears(model)
    if not layers or not _choose(innermost(model), layers):
        return {}
    return {layer: _find_product(layer) for layer in layers}


def find_linears(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers whose weights can be prepacked; none of a model that is compiled, or has such layers."""
    modules = list(model.modules())
    if any(is_compiled(module) for module in modules):
        return []
    return [m for m in modules if type(m) is nn.Linear and _runs_as_usual(m) and can_prepack(m)]


def is_compiled(module: nn.Module) -> bool:
    """Return True for a module that runs as a graph: of ``torch.compile``, its own ``compile``, or a wrapper's."""
    if isinstance(module, Wrapped) and module.spec.compile:
        return True
    return type(module).__name__ == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None


def can_prepack(layer: nn.Linear) -> bool:
    """Return True if the layer's parameters are plain ones on a CPU whose oneDNN has the products."""
    weight, bias = layer.weight, layer.bias
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype in MOST_ROWS
        and weight.is_contiguous()
        and not weight.is_inference()
        and (bias is None or _takes_bias(bias, weight))
        and weight.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and _works(weight.dtype)
    )


@contextmanager
def use_products(products: Mapping[nn.Module, PrepackedProduct]) -> Iterator[None]:
    """Let linear layers run by their products within the block; see ``find_products``."""
    for layer, product in products.items():
        vars(layer)["forward"] = product  # as nn.Module would set it, in a tenth of the time
    try:
        yield
    finally:
        for layer in products:
            vars(layer).pop("forward", None)  # the class's own shows again


def count_copied_bytes(model: nn.Module) -> int:
    """Return the bytes that the copies of a model's weights take now."""
    products = [product for layer in model.modules() if (product := _PRODUCTS.get(layer)) is not None]
    weights = {id(p.prepacked): p.prepacked for p in products if p.prepacked.has_copy}
    return sum(each.weight.nbytes for each in weights.values())


def count_weight_bytes(layers: Iterable[nn.Linear]) -> int:
    """Return the bytes of layers' weights, those of a shared weight once: what their copies take."""
    return sum({id(layer.weight): layer.weight.nbytes for layer in layers}.values())


def _find_product(layer: nn.Linear) -> PrepackedProduct:
    product = _PRODUCTS.get(layer)
    if product is None or not product.is_of(layer):
        product = PrepackedProduct(layer.weight, layer.bias)
        with _LOCK:
            _PRODUCTS[layer] = product
    product.prepacked.refresh()
    return product


def _choose(base: nn.Module, layers: list[nn.Linear]) -> bool:
    """Return whether a model is prepacked: what was chosen, or decided before, or what the free memory allows."""
    known = _CHOICES.get(base)
    if known is None:
        size = count_weight_bytes(layer for layer in layers if id(layer.weight) not in _WEIGHTS)
        free = read_cpu_memory()[1]
        known = _CHOICES[base] = size <= MEMORY_SHARE * free
        if not known:
            _LOG.info(
                "weights are not prepacked: the copy takes %.1f GB of %.1f GB that are free; prepack=True makes it",
                size / 1e9, free / 1e9,
            )  # fmt: skip
    return known


def _runs_as_usual(layer: nn.Linear) -> bool:
    """Return True if the layer has the forward of its class, or is within ``use_products`` of another thread."""
    return "forward" not in vars(layer) or isinstance(vars(layer)["forward"], PrepackedProduct)


def _takes_bias(bias: Tensor, weight: Tensor) -> bool:
    """Return True for a bias that oneDNN reads as ``F.linear`` does."""
    same_kind = bias.dtype == weight.dtype and bias.device == weight.device
    return same_kind and bias.shape == weight.shape[:1] and bias.is_contiguous()


def _describe(weight: Tensor) -> tuple[int, ...]:
    """Return what changes with a weight: address, version, and the sum of its bytes as whole numbers.

    Writing through ``.data``, and fused optimizers, change no version. The sum wraps around, and any change of one
    number changes it; it takes as long as reading the weight.
    """
    start = weight.storage_offset() * weight.element_size()
    widths = (torch.int64, torch.int32, torch.int16)
    wide = next(dtype for dtype in widths if weight.nbytes % dtype.itemsize == start % dtype.itemsize == 0)
    return weight.data_ptr(), _get_version(weight), int(weight.detach().flatten().view(wide).sum())


@cache
def _works(dtype: torch.dtype) -> bool:
    """Return True if this machine's oneDNN has the products, and they are right: seen on one small product."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (3, 48))
    try:
        if dtype == torch.bfloat16 and not _find_bf16_check(torch.ops)():
            return False
        y = _find_multiply(torch.ops)(x, _find_reorder(torch.ops)(weight), None, "none", [], "")
    except (AttributeError, RuntimeError):  # another torch
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    return torch.allclose(y.float(), F.linear(x.float(), weight.float()), rtol=tolerance, atol=10 * tolerance)
