"""Starts the batches that decode: over a static cache where the model's step mode says so and the model allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from selfdoubt import density
from selfdoubt.lm.decode import DecodeBatch, SequenceBatch, TokenSequence
from selfdoubt.lm.front import ModelWithFront
from selfdoubt.lm.probes import choose_fork, find_probes
from selfdoubt.lm.static.decoder import StaticDecoder
from selfdoubt.lm.step_modes import StepMode, choose_step_mode
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.members import Wrapped
from selfdoubt.rows import Replacement


class StepMemory(NamedTuple):
    """Memory that decoding keeps between steps, apart from the model and from caches that grow."""

    cache_bytes: int = 0  #: of static key-value caches
    graph_bytes: int = 0  #: of captured CUDA graphs
    graphs: int = 0  #: number of captured graphs


class _Known(NamedTuple):
    """A decoder, and what it was made for."""

    purpose: tuple[object, ...]
    decoder: StaticDecoder


_DECODERS: WeakKeyDictionary[ModelWithFront, _Known] = WeakKeyDictionary()


def find_decoder(lm: ModelWithFront) -> StaticDecoder | None:
    """Return the static decoder of a model, which is built once; None where its steps are eager.

    Raises:
        ConfigError: If steps are to be captured where there is no CUDA GPU.
    """
    mode = choose_step_mode(lm.step, next(lm.model.parameters()).device)
    if mode == "eager":
        return None
    known, purpose = _DECODERS.get(lm), (id(lm.model), lm.front.layers, mode, *_describe(lm.model))
    if known is None or known.purpose != purpose:
        known = _DECODERS[lm] = _Known(purpose, _build_decoder(lm.model, lm.front.layers, mode))
    return known.decoder


def _build_decoder(model: nn.Module, layers: tuple[int, ...], mode: StepMode) -> StaticDecoder:
    """Build the decoder of a model; it holds the model, and not the ``RiskAwareLM`` around it."""
    return StaticDecoder(lambda: HFStepper(model, layers, None, find_probes(model), choose_fork(mode)), mode)


def _describe(model: nn.Module) -> tuple[object, ...]:
    """Return what a captured step holds as constants: settings of wrappers, and the addresses of all weights."""
    specs = tuple(module.spec for module in model.modules() if isinstance(module, Wrapped))
    replaced = [module for module in model.modules() if isinstance(module, Replacement)]
    scales = tuple((getattr(module, "alpha", None), getattr(module, "distribution", None)) for module in replaced)
    measured = density.find_measured_leaf(model)
    fitted = None if measured is None else (measured.is_fitted, measured.has_background)
    return specs, scales, fitted, tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))


def measure_step_memory(lm: ModelWithFront) -> StepMemory:
    """Return the memory that a model's static caches and captured graphs hold now."""
    known = _DECODERS.get(lm)
    if known is None:
        return StepMemory()
    decoder = known.decoder
    return StepMemory(decoder.cache_bytes, decoder.graph_bytes, decoder.graphs)


def start_decoding(
    lm: ModelWithFront, stepper: HFStepper, next_logits: StepOutput, sequences: Sequence[TokenSequence]
) -> SequenceBatch:
    """Start a batch of sequences whose prompts were read.

    Args:
        lm: The model.
        stepper: A stepper that has read the prompts.
        next_logits: Logits of each sequence's next token.
        sequences: The sequences, in the order of the prompts.

    Raises:
        ConfigError: If steps are to be captured where there is no CUDA GPU.
    """
    decoder = find_decoder(lm)
    batch = None if decoder is None else decoder.start(stepper, next_logits, sequences)
    return DecodeBatch(stepper, next_logits, sequences) if batch is None else batch
