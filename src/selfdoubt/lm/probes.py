"""Builds steppers with the probes that read a model's inside while it decodes, for scores that cost no further pass."""

from __future__ import annotations

from typing import Literal

from torch import nn

from selfdoubt.errors import ConfigError
from selfdoubt.lm.attention import AttentionProbe, find_attention, middle_third
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.front import ModelWithFront
from selfdoubt.lm.hidden_states import find_decoder_layers
from selfdoubt.lm.late_layers import find_late_layers
from selfdoubt.lm.step_modes import StepMode
from selfdoubt.lm.step_output import Probe
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.members import Wrapped
from selfdoubt.wrapping import innermost


def find_probes(model: nn.Module) -> list[Probe]:
    """Build the probes that suit a model: none for a compiled one, nor for a model without a stack of layers."""
    base = innermost(model)
    if isinstance(model, Wrapped) and model.spec.compile:
        return []
    try:
        stack = find_decoder_layers(base)
    except ConfigError:
        return []
    probes: list[Probe] = []
    modules = [find_attention(stack[layer]) for layer in middle_third(len(stack))]
    if all(module is not None for module in modules):
        probes.append(AttentionProbe([module for module in modules if module is not None]))
    late = find_late_layers(base)
    return probes if late is None else [*probes, late]


def build_stepper(lm: ModelWithFront, sizer: ChunkSizer | None = None) -> HFStepper:
    """Build the stepper of a risk-aware model, with the layers and probes that its answers take."""
    return HFStepper(lm.model, lm.front.layers, sizer, find_probes(lm.model), choose_fork(lm.step))


def choose_fork(mode: StepMode) -> Literal["late"] | None:
    """Return the fork of members for a step mode: a compiled step has none, whose hooks no graph can hold."""
    return None if mode == "compiled" else "late"
