"""Diagnoses a model on its device: memory, step time against the memory's bandwidth, and what would make it faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from selfdoubt.compat import get_output_head, is_quantized, list_quantization_states
from selfdoubt.errors import ConfigError
from selfdoubt.kernels import count_features
from selfdoubt.lm.adapters.lora import list_lora_names
from selfdoubt.lm.decoding import measure_step_memory
from selfdoubt.lm.front import ModelWithFront
from selfdoubt.lm.hardware import Device, describe_device
from selfdoubt.lm.load import count_token_ids
from selfdoubt.lm.prepacked import count_copied_bytes, count_weight_bytes, find_linears
from selfdoubt.lm.step_modes import choose_step_mode
from selfdoubt.lm.step_times import WARM_STEPS, time_plain_steps, time_prefill, time_steps
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.members import Wrapped, count_rows
from selfdoubt.rows import Replacement, list_added_names
from selfdoubt.targets import replace_module
from selfdoubt.wrapping import innermost

#: Tokens of the prompts whose reading and answering are timed.
PROMPT, LONG_PROMPT = 32, 256
#: Share of the free memory that a cache may fill; the rest is for logits and activations.
USABLE = 0.9


@dataclass(frozen=True)
class WeightSizes:
    """Weights of a model without what was added to it."""

    parameters: int
    bytes: int
    bytes_by_dtype: Mapping[str, int]
    quantized: bool


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of a key-value cache, and the longest contexts that fit the free memory."""

    bytes_per_1000_tokens: int  #: of one sequence and member, before any sliding window is full
    members: int  #: rows per sequence
    longest_alone: int  #: tokens of a single sequence, at most the model's context
    longest_in_batch: int  #: tokens of each of ``batch`` sequences
    batch: int
    context: int | None  #: most tokens that the model reads


@dataclass(frozen=True)
class GraphSizes:
    """Captured graphs of decoding steps."""

    count: int
    bytes: int
    note: str


@dataclass(frozen=True)
class StepTimes:
    """Times of one sequence, seconds per token; ``share`` is the part of the bandwidth that a step reaches."""

    bytes_read: int  #: by a step: weights, added parameters and cache
    predicted: float  #: bytes read over the device's bandwidth
    plain: float  #: of the model without members and scores
    measured: float  #: of the model as it is, with the risk of each token
    share: float
    prefill_tokens_per_second: float


@dataclass(frozen=True)
class Diagnosis:
    """A model, its wrapper and its device, measured, and advice in order of its weight."""

    model: str | None
    wrapper: str
    dtype: str
    attention: str  #: implementation that the model's config names
    weights: WeightSizes
    added_parameters: int
    added_bytes: int
    prepacked_bytes: int  #: copies of weights in a layout that a CPU reads faster, see ``prepacked``
    cache: CacheSizes
    graphs: GraphSizes
    steps: StepTimes
    device: Device
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def diagnose(lm: ModelWithFront, *, batch: int = 32, steps: int = 8) -> Diagnosis:
    """Measure a model on its device; takes the time of a few prompts and steps.

    Args:
        lm: A risk-aware model.
        batch: Sequences that are served side by side.
        steps: Decoding steps to time, at least 1.

    Raises:
        ConfigError: If a number is out of range, or the model's context too short for a prompt and its answer.

    Example:
        >>> from selfdoubt import RiskAwareLM
        >>> diagnosis = diagnose(RiskAwareLM.load("pocket"), steps=1)
        >>> diagnosis.cache.members
        3
    """
    for name, value in (("batch", batch), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
            raise ConfigError(f"{name} must be a whole number between 1 and 4096, got {value!r}")
    model, base = lm.model, innermost(lm.model)
    device = next(model.parameters()).device
    weights, added_parameters, added_bytes, read = measure_weights(model)
    members = count_rows(model)
    context = HFStepper(model).context
    prompt = min(PROMPT, (context or PROMPT + steps + WARM_STEPS + 1) - steps - WARM_STEPS - 1)
    if prompt < 1:
        raise ConfigError(f"{steps} steps do not fit the model's context of {context} tokens; use fewer steps")
    here = describe_device(device)
    ids = _draw_prompt(base, min(LONG_PROMPT, (context or LONG_PROMPT) - 1))
    with without_members(model) as plain_model:
        layers = measure_cache_layers(plain_model, ids[:prompt])
        plain = time_plain_steps(plain_model, ids[:prompt], steps)
    measured = time_steps(lm, ids[:prompt], steps)
    speed = time_prefill(lm, ids)
    cache = CacheSizes(
        round(1000 * sum(size for size, _ in layers)), members,
        find_longest(layers, members, USABLE * here.free_bytes, context),
        find_longest(layers, members * batch, USABLE * here.free_bytes, context), batch, context,
    )  # fmt: skip
    read += round(members * sum(size * min(prompt, window or prompt) for size, window in layers))
    predicted = read / here.bandwidth
    times = StepTimes(read, predicted, plain, measured, predicted / measured, speed)
    dtype = str(next(p.dtype for p in base.parameters() if p.is_floating_point())).removeprefix("torch.")
    attention = str(getattr(base.config, "_attn_implementation", None) or "of the model's own")
    return Diagnosis(
        lm.front.name, _describe_wrapper(model), dtype, attention, weights, added_parameters, added_bytes,
        count_copied_bytes(model), cache, count_graphs(lm, device), times, here,
        (*advise(here, dtype, attention, weights, cache, times, added_bytes), *_advise_prepacking(lm, here)),
    )  # fmt: skip


def measure_weights(model: nn.Module) -> tuple[WeightSizes, int, int, int]:
    """Return the sizes of the weights; numbers and bytes of added parameters; and the bytes that a step reads.

    A step reads one row of the embedding, unless it is the head, too.
    """
    added = set(list_added_names(model)) | list_lora_names(model)
    states = [t for state in list_quantization_states(model) for t in vars(state).values() if isinstance(t, Tensor)]
    kept = {id(t): t for name, t in (*model.named_parameters(), *model.named_buffers()) if name not in added}
    kept |= {id(t): t for t in states}
    extra = {id(p): p for name, p in model.named_parameters() if name in added}
    by_dtype: dict[str, int] = {}
    for tensor in kept.values():
        name = str(tensor.dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + tensor.nbytes
    packed = [m for m in model.modules() if is_quantized(m)]
    parameters = sum(p.numel() for p in kept.values() if isinstance(p, nn.Parameter))
    for layer in packed:
        fan_in, fan_out = count_features(layer)
        parameters += fan_in * fan_out - layer.get_parameter("weight").numel()
    sizes = WeightSizes(parameters, sum(by_dtype.values()), by_dtype, bool(packed))
    extra_bytes = sum(p.nbytes for p in extra.values())
    base: Any = innermost(model)
    table, head = base.get_input_embeddings(), get_output_head(base)
    is_tied = head is not None and getattr(head, "weight", None) is getattr(table, "weight", None)
    unread = 0 if is_tied else sum(p.nbytes for p in table.parameters() if id(p) in kept)
    return sizes, sum(p.numel() for p in extra.values()), extra_bytes, sizes.bytes + extra_bytes - unread


@contextmanager
def without_members(model: nn.Module) -> Iterator[nn.Module]:
    """Give the model inside all wrappers with its own leaves in their places, for one row per sequence."""
    base = innermost(model)
    replaced: list[tuple[str, Replacement]] = []
    for name, module in base.named_modules():
        if isinstance(module, Replacement) and not any(name.startswith(f"{outer}.") for outer, _ in replaced):
            replaced.append((name, module))
    for name, module in replaced:
        leaf: nn.Module = module
        while isinstance(leaf, Replacement):
            leaf = leaf.leaf
        replace_module(base, name, leaf)
    try:
        yield base
    finally:
        for name, module in replaced:
            replace_module(base, name, module)


@torch.inference_mode()
def measure_cache_layers(model: nn.Module, ids: list[int]) -> list[tuple[float, int | None]]:
    """Return, of each layer with a cache, the bytes per token of one row, and its sliding window."""
    rows = torch.tensor([ids], device=next(model.parameters()).device)
    cache = getattr(model(input_ids=rows, use_cache=True), "past_key_values", None)
    layers = []
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4 and keys.numel():
            window = getattr(layer, "sliding_window", None)
            layers.append(((keys.nbytes + values.nbytes) / keys.shape[-2], int(window) if window else None))
    return layers


def find_longest(layers: list[tuple[float, int | None]], rows: int, free: float, context: int | None) -> int:
    """Return the largest number of tokens whose cache fits the free bytes, at most the context or 2**24."""

    def fits(length: int) -> bool:
        return rows * sum(size * min(length, window or length) for size, window in layers) <= free

    low, high = 0, context or 2**24
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def count_graphs(lm: ModelWithFront, device: torch.device) -> GraphSizes:
    """Return the graphs that decoding has captured so far, and the way in which steps run."""
    mode, memory = choose_step_mode(lm.step, device), measure_step_memory(lm)
    note = f"steps are {mode}" + (", graphs need a CUDA GPU" if device.type == "cpu" else "")
    return GraphSizes(memory.graphs, memory.graph_bytes, note)


def advise(
    device: Device,
    dtype: str,
    attention: str,
    weights: WeightSizes,
    cache: CacheSizes,
    steps: StepTimes,
    added_bytes: int = 0,
) -> tuple[str, ...]:
    """Return what to change, the most important first: each a flag or a setting, and why."""
    advice = []
    if device.kind == "cpu":
        if dtype == "float16":
            advice.append("--dtype bfloat16: float16 is emulated on a CPU")
        if dtype == "float32" and device.bf16:
            advice.append(f"--dtype bfloat16: this CPU computes it ({device.bf16[0]}), and a step reads half the bytes")
        if dtype == "bfloat16" and not device.bf16:
            advice.append("--dtype float32: this CPU only emulates bfloat16")
        if device.threads is not None and device.cores is not None and device.threads < device.cores:
            advice.append(
                f"OMP_NUM_THREADS={device.cores} (serve: --threads): {device.threads} of {device.cores} cores compute"
            )
    elif steps.share < 0.3:
        advice.append(
            "serve several requests at once (selfdoubt serve --batch): a step of one sequence reaches "
            f"{steps.share:.0%} of the bandwidth, so it waits for its kernels to be launched"
        )
    if attention == "eager":
        advice.append("load the model with sdpa attention: eager attention keeps whole matrices of weights")
    enough = min(cache.context or 4096, 4096)
    if cache.longest_in_batch < enough:
        fitting = max(1, cache.batch * cache.longest_in_batch // enough)
        nf4 = "--quantize nf4, or " if device.kind == "cuda" and not weights.quantized else ""
        advice.append(
            f"{nf4}serve --batch {fitting}: {cache.batch} sequences of {enough} tokens do not fit the free memory"
        )
    if cache.members > 1 and added_bytes > 0.1 * weights.bytes:
        advice.append(
            f"deviations of low rank (--wrapper vote:rank=16): members add {added_bytes / weights.bytes:.0%} to what a "
            "step reads"
        )
    if cache.members > 1 and steps.measured > 1.5 * steps.plain:
        advice.append(
            f"fewer members (--wrapper none, or 2 of them): {cache.members} rows and their scores take "
            f"{steps.measured / steps.plain:.1f} times a plain step"
        )
    return tuple(advice)


def _advise_prepacking(lm: ModelWithFront, device: Device) -> list[str]:
    """Return advice to prepack weights where that is off and could be on."""
    layers = find_linears(lm.model)
    if not layers or count_copied_bytes(lm.model) or choose_step_mode(lm.step, layers[0].weight.device) != "eager":
        return []
    size = count_weight_bytes(layers)
    if size > USABLE * device.free_bytes:
        return []
    return [f"--prepack: copies of the weights, {size / 1e6:,.0f} MB, that this CPU reads faster"]


def _describe_wrapper(model: nn.Module) -> str:
    """Return the wrappers, outermost first, with the settings that are no defaults; "none" without any."""
    texts = []
    while isinstance(model, Wrapped):
        spec: Any = model.spec
        changed = (f"{f.name}={getattr(spec, f.name)!r}" for f in fields(spec) if _is_changed(f, spec))
        texts.append(f"{type(spec).__module__.rpartition('.')[2]}({', '.join(changed)})")
        model = model.module
    return ", around ".join(texts) or "none"


def _is_changed(each: Field[Any], spec: Any) -> bool:
    return getattr(spec, each.name) not in (each.default, None, False)


def _draw_prompt(base: nn.Module, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [int(i) for i in torch.randint(count_token_ids(base), (length,), generator=generator)]
