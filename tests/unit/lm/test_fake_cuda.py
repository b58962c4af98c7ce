"""A turn on fake CUDA tensors neither copies from the host nor reads a value; a batch's turns make no copy that waits.

No GPU is needed. Torch's CPU build has no device guard for CUDA, so that even ``x[None]`` raises for a fake tensor; the
guard of meta tensors, which does nothing, takes its place in c10's table of guards within ``fake_cuda``.
"""

from __future__ import annotations

import copy
import ctypes
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfdoubt import factors, sample, sculpt, vote
from selfdoubt.lm.decode import TokenSequence
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.static.decoder import StaticDecoder
from selfdoubt.lm.static.host_reads import READS, HostReadGuard, decompose, has_mask
from selfdoubt.lm.static.slots import SlotCache
from selfdoubt.lm.static.step import StaticStep
from selfdoubt.lm.static.stepper import Buckets
from selfdoubt.lm.static.turn import DecodeTurn, TurnBuffers
from selfdoubt.lm.stepper import HFStepper
from tests.zoo import FAMILIES, causal, prompts

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")

_CUDA, _META = 1, 14  # c10::DeviceType
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
RANDOM = ("rand", "randn", "rand_like", "randn_like", "randint", "bernoulli", "bernoulli_", "normal_", "uniform_",
          "native_dropout", "multinomial")  # fmt: skip
SLOTS = 4
WRAPPERS: dict[str, Any] = {
    "none": lambda model: model,
    "vote": vote.Wrapper(n_voters=3, rank=2),
    "vote-full": vote.Wrapper(n_voters=3),
    "vote-base": vote.Wrapper(n_voters=3, rank=2, answer_from="base"),
    "vote-answer": vote.Wrapper(n_voters=3, rank=2, start="answer"),
    "vote-late": vote.Wrapper(n_voters=3, rank=2, param_filter=r"layers\.1\."),
    "sample": sample.Wrapper(n_samples=3),
    "sample-trainable": sample.Wrapper(n_samples=3, distribution=sample.Bernoulli(0.1, trainable=True)),
    "sculpt": sculpt.Wrapper(),
    "vote-sculpt": lambda model: vote.Wrapper(n_voters=3, rank=2)(sculpt.Wrapper()(model)),
}


class Recorder(TorchDispatchMode):
    """Notes each operation that on a GPU would wait, copy, or draw.

    Args:
        fake: Mode of the fake tensors, where the caller is not in it: then tensors on the host stay real, and the host
            gets made-up values where it reads one from the device.
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self._fake = fake
        self.kernels = 0  #: operations on the device that are no views
        self.notes: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, _, base = func._schema.name.partition("::")
        if namespace == "prim":
            return func(*args, **kwargs)
        out = decompose(self, func, args, kwargs)
        if out is not NotImplemented:
            return out
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in inputs}
        is_read = base in READS and "cuda" in devices
        if is_read:
            self._note(func, "reads a value")
        if self._fake is not None and base == "_local_scalar_dense" and isinstance(inputs[0], FakeTensor):
            return True if inputs[0].dtype == torch.bool else 1.5 if inputs[0].is_floating_point() else 1
        goes = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if self._fake is not None and (goes or any(isinstance(x, FakeTensor) for x in inputs)):
            with self._fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        everywhere = devices | {x.device.type for x in results}
        if "cuda" not in everywhere:
            return out
        if not func.is_view and base not in ("detach", "alias", "_unsafe_view", "lift_fresh", "empty", "empty_strided"):
            self.kernels += 1
        if base in ("_to_copy", "copy_"):
            waits = base == "_to_copy" and not kwargs.get("non_blocking")
            waits |= base == "copy_" and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if len(everywhere) > 1:
                self._note(func, "copies and waits" if waits else "copies")
        elif len({x.device.type for x in inputs if x.ndim}) > 1:
            self._note(func, "mixes devices")
        if base in ("index", "index_put", "index_put_") and has_mask(args):
            self._note(func, "is indexed by a mask")
        if base in RANDOM:
            self._note(func, "draws")
        return out

    def _note(self, func: Any, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/selfdoubt/" in f.filename or "/transformers/" in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))
        self.notes.append(f"{what}: {func} at {where}")


@contextmanager
def fake_cuda(*, capturing: bool):
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        table = (ctypes.c_void_p * 24).in_dll(library, _GUARDS)
    except (OSError, ValueError):
        pytest.skip("this build of torch has no table of device guards by that name")
    known, lifts = table[_CUDA], torch._C._only_lift_cpu_tensors()
    table[_CUDA] = known or table[_META]
    torch._C._set_only_lift_cpu_tensors(True)  # ``torch.tensor(..., device="cuda")`` is made on the host, then moved
    try:
        with (
            mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=capturing),
            # A parameter of fake data is no ``nn.Parameter``, which stacks of factors ask for.
            mock.patch.object(factors, "nn", SimpleNamespace(Parameter=FakeTensor, Module=nn.Module)),
        ):
            yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        table[_CUDA] = known
        torch._C._set_only_lift_cpu_tensors(lifts)


def move(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put a fake CUDA tensor in the place of each tensor of a model; forget what leaves have kept."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def change(x: Tensor) -> Tensor:
        if id(x) not in moved:
            with mode:
                y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            moved[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y, x
        return moved[id(x)][0]

    for module in model.modules():
        for place in (module._parameters, module._buffers, vars(module)):
            place.update({name: change(x) for name, x in place.items() if isinstance(x, Tensor)})
        if hasattr(module, "_kept"):
            vars(module)["_kept"] = {}
        if hasattr(module, "group"):
            module.group._stacks, module.group._products = {}, None


def record_turn(model: nn.Module, draws: Any, alternatives: int = 2) -> Recorder:
    """Run the second turn of a model on fake CUDA tensors."""

    def build() -> HFStepper:
        return HFStepper(model, (0,), None, find_probes(model))

    with torch.inference_mode():  # on the host first: forks are checked, and probes read for the first time
        stepper, runner = build(), build()
        prefill(stepper, prompts(3, 5))
        cache = SlotCache.like(stepper.cache, 2, SLOTS, 16)
        step = StaticStep(runner, cache)
        step.run(torch.zeros(SLOTS, dtype=torch.long))
    with fake_cuda(capturing=True) as mode:
        move(model, mode)
        runner.device = cache._layout.device = torch.device("cuda:0")
        with mode, torch.inference_mode():
            cache._positions = torch.zeros(256, dtype=torch.long, device="cuda")
            for layer in cache.kept:
                layer._storage = ()
                layer.allocate()
            turn = DecodeTurn(step, TurnBuffers(runner.device), draws, alternatives)
            with turn.probing():
                with HostReadGuard():  # as before every capture; factors are stacked, and noise is made
                    turn.run_probed()
                with Recorder() as recorder:
                    output = turn.run_probed()
    assert all(x.device.type == "cuda" for x in output.tensors)
    assert recorder.kernels > 100
    return recorder


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_turn_neither_waits_nor_draws_nor_copies(name):
    assert not record_turn(WRAPPERS[name](copy.deepcopy(causal("llama", torch.float32))), "top_p").notes


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_reads_a_value_in_a_turn(family):
    model = vote.Wrapper(n_voters=3, rank=2)(copy.deepcopy(causal(family, torch.bfloat16)))
    assert not record_turn(model, "greedy").notes


def test_a_turn_that_reads_a_value_is_refused_before_it_is_captured():
    model = copy.deepcopy(causal("llama", torch.float32))
    rotary = model.model.rotary_emb

    def read(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        positions = options.get("position_ids", inputs[-1])
        if positions.max() > 10**6:  # as rotations do that depend on the length
            raise AssertionError

    rotary.register_forward_pre_hook(read, with_kwargs=True)
    with pytest.raises(RuntimeError, match="reads a value of the device, which no graph can hold"):
        record_turn(model, "greedy")


def test_copies_between_devices_are_refused():
    with HostReadGuard():
        assert torch.ones(3).to(torch.float64).sum().item() == 3  # the host's own values may be read
        with pytest.raises(RuntimeError, match="copies between the host and the device"):
            torch.ones(3).to("meta")


READING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.index_put_((x > 0,), torch.ones(())),
    "where": lambda x: torch.where(x > 0),
    "argwhere": torch.argwhere,
    "repeat": lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])),
    "multinomial": lambda x: x.multinomial(1),
    "unique": lambda x: x.unique_consecutive(),
    "allclose": lambda x: torch.allclose(x, x),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", READING)
def test_values_that_the_host_reads_are_refused(how, inference):
    x = torch.ones(3)
    with torch.inference_mode(inference), HostReadGuard("cpu"), pytest.raises(RuntimeError, match="reads a value"):
        READING[how](x)
    with torch.inference_mode(inference), HostReadGuard("cpu"):
        torch.where(x > 0, x, 0).masked_fill(x > 0, 1)[torch.tensor([0, 2])].repeat_interleave(2).sort()


class _Event:
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...


def test_turns_of_a_batch_make_only_copies_that_do_not_wait():
    model = vote.Wrapper(n_voters=3, rank=2)(copy.deepcopy(causal("llama", torch.float32)))

    def build() -> HFStepper:
        return HFStepper(model, (0,), None, find_probes(model))

    def unpinned(make):  # the host of this test has no pages to pin, and what the device sends is never written there
        def build(*args, pin_memory=False, **options):
            made = make(*args, **options)
            return made.zero_() if pin_memory else made

        return build

    with torch.inference_mode():
        prefill(build(), prompts(3, 5))
    with (
        fake_cuda(capturing=False) as mode,
        mock.patch.object(torch.cuda, "Event", _Event),
        mock.patch.object(torch.cuda, "current_stream", return_value=None),
        mock.patch.object(torch, "zeros", unpinned(torch.zeros)),
        mock.patch.object(torch, "empty", unpinned(torch.empty)),
    ):
        starts = prompts(3, 5)
        move(model, mode)
        with Recorder(mode) as recorder:
            decoder = StaticDecoder(build, "static", buckets=Buckets(64))
            decoder._is_checked = True
            stepper = build()
            _, following = prefill(stepper, starts)
            sampling = Sampling(0.8, 0.9, 30, alternatives=2)
            batch = decoder.start(stepper, following, [TokenSequence(n, sampling, n, 40) for n in range(len(starts))])
            batch.choose()
            batch.step()
            for _ in range(3):
                recorder.notes.clear()
                batch.choose()
                batch.step()
                kinds = Counter(note.split(":")[0] for note in recorder.notes)
                assert kinds == {"copies": 4}, recorder.notes  # draws there; numbers, states and attention back
