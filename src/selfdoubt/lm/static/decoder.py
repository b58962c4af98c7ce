"""The static decoder of a model: batches in slots, whose turns run as they are, compiled, or as CUDA graphs."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakSet

import torch

from selfdoubt.errors import SlowWarning
from selfdoubt.lm.attention_backends import steady_attention
from selfdoubt.lm.decode import TokenSequence
from selfdoubt.lm.static.arena import Arena
from selfdoubt.lm.static.batch import SlotBatch
from selfdoubt.lm.static.check import compare_static_step
from selfdoubt.lm.static.cuda_graphs import GraphCache
from selfdoubt.lm.static.step import find_obstacle
from selfdoubt.lm.static.stepper import Buckets
from selfdoubt.lm.static.turn import DecodeTurn, TurnOutput
from selfdoubt.lm.step_modes import StepMode
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.messages import log

#: Compiled turns that are kept, and columns of the smallest cache of a compiled step, which must not change often.
_MAX_COMPILED, _COMPILED_LENGTH = 24, 1024


class StaticDecoder:
    """Starts batches of a model in the slots of a static cache.

    It keeps one arena, with its memory and its captured graphs, between batches.

    Args:
        build: Function that builds a stepper of the model, with probes.
        mode: "static", "captured" or "compiled".
        ahead: Launch turns before the results of the last one are read; None where there is a GPU.
        buckets: Sizes of the cache.
    """

    def __init__(
        self,
        build: Callable[[], HFStepper],
        mode: StepMode,
        *,
        ahead: bool | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self._build, self.mode = build, mode
        self._runner = build()
        self._device = self._runner.device
        self._ahead = self._device.type == "cuda" if ahead is None else ahead
        self._buckets = buckets or (Buckets(_COMPILED_LENGTH) if mode == "compiled" else Buckets())
        self._idle: Arena | None = None
        self._arenas: WeakSet[Arena] = WeakSet()
        self._graphs = GraphCache(self._device) if self._device.type == "cuda" and mode != "static" else None
        self._compiled: OrderedDict[Hashable, DecodeTurn] = OrderedDict()
        self._is_checked, self.obstacle = False, ""  #: the reason why the model cannot have a static cache

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory that static caches hold."""
        return sum(arena.cache.bytes for arena in list(self._arenas))

    @property
    def graph_bytes(self) -> int:
        """Bytes of GPU memory that captured graphs hold, apart from caches."""
        return 0 if self._graphs is None else self._graphs.bytes

    @property
    def graphs(self) -> int:
        """Number of captured graphs."""
        return 0 if self._graphs is None else len(self._graphs)

    def start(
        self, stepper: HFStepper, next_logits: StepOutput, sequences: Sequence[TokenSequence]
    ) -> SlotBatch | None:
        """Start a batch of sequences whose prompts a stepper has read; None if the model cannot have a static cache.

        Warns:
            SlowWarning: The first time, if it cannot.
        """
        if not self._is_checked:
            self._check(stepper)
        if self.obstacle:
            return None
        return SlotBatch(self._open, self._close, stepper, next_logits, sequences, ahead=self._ahead)

    def _check(self, stepper: HFStepper) -> None:
        """Find out whether the model can have a static cache."""
        self._is_checked = True
        self.obstacle = find_obstacle(stepper) or compare_static_step(self._runner, self._build) or ""
        if self.obstacle:
            name = type(self._runner.base).__name__
            warnings.warn(f"{name} is decoded step by step: {self.obstacle}", SlowWarning, stacklevel=2)

    def _open(self, stepper: HFStepper) -> Arena:
        arena, self._idle = self._idle, None
        if arena is None:
            arena = Arena(self._runner, stepper, self._buckets, self._launch)
            self._arenas.add(arena)
        return arena

    def _close(self, arena: Arena) -> None:
        arena.clear()
        # Without graphs and compiled turns there is nothing to keep the memory for.
        if self.mode != "static" and self._idle is None:
            self._idle = arena

    def _launch(self, key: Hashable, build: Callable[..., DecodeTurn]) -> TurnOutput:
        if self._graphs is None:
            return self._run_uncaptured(key, build)
        try:
            return self._graphs.run(key, lambda: self._build_turn(key, build))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            output = self._run_uncaptured(key, build)  # raises an error of the model's own again
            self._give_up(error)
            return output

    def _run_uncaptured(self, key: Hashable, build: Callable[..., DecodeTurn]) -> TurnOutput:
        with steady_attention():
            return self._build_turn(key, build)()

    def _give_up(self, error: Exception) -> None:
        """Go on without graphs."""
        assert self._graphs is not None
        self._graphs.clear()
        self._graphs = None
        reason = " ".join(str(error).split())[:200]
        name = type(self._runner.base).__name__
        warnings.warn(f"a step of {name} cannot be captured as a CUDA graph ({reason})", SlowWarning, stacklevel=2)

    def _build_turn(self, key: Hashable, build: Callable[..., DecodeTurn]) -> DecodeTurn:
        """Return the turn of this key; a compiled one is compiled at its first run."""
        if self.mode != "compiled":
            return build()
        if key not in self._compiled:
            if len(self._compiled) >= _MAX_COMPILED:
                self._compiled.popitem(last=False)
            self._compiled[key] = self._compile(build)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def _compile(self, build: Callable[..., DecodeTurn]) -> DecodeTurn:
        """Compile a turn, and report the time that it took; a turn that cannot be compiled runs as it is."""
        turn, began = build(compiled=True), time.perf_counter()
        saved = turn.save()
        try:
            with torch._dynamo.config.patch(recompile_limit=4 * _MAX_COMPILED), steady_attention():
                turn()
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = " ".join(str(error).split())[:200]
            name = type(self._runner.base).__name__
            warnings.warn(f"a step of {name} cannot be compiled ({reason})", SlowWarning, stacklevel=2)
            self.mode = "captured" if self._graphs is not None else "static"
            turn = build()
        finally:
            turn.restore(saved)
        log.info("compiled a step in %.0f s", time.perf_counter() - began)
        return turn
