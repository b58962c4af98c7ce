"""Turns captured as CUDA graphs: a replay launches all of a turn's kernels at once, without Python between them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch

from selfdoubt.lm.attention_backends import steady_attention
from selfdoubt.lm.static.host_reads import HostReadGuard
from selfdoubt.lm.static.turn import DecodeTurn, TurnOutput

#: Graphs that are kept for one batch; beyond, the one that was not used for the longest time goes.
MAX_GRAPHS = 32
#: Turns that run before one is captured, so that libraries choose their kernels and reserve their workspaces.
_WARM_UP = 2


class GraphCache:
    """Captured turns by key, of which those that were used lately are kept.

    All share one pool of memory: they never run at the same time.

    Args:
        device: The GPU.
        most: Largest number of graphs.
    """

    def __init__(self, device: torch.device, most: int = MAX_GRAPHS) -> None:
        self._device, self._most = device, most
        self._graphs: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, TurnOutput]] = OrderedDict()
        self._pool: Any = None
        self._stream: Any = None  # of all captures, as a pool belongs to one
        self._bytes: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        """Bytes that were reserved for the captures of the graphs that are kept."""
        return sum(self._bytes.values())

    def run(self, key: Hashable, build: Callable[[], DecodeTurn]) -> TurnOutput:
        """Replay the graph of this key, or capture it first. The next run of the same graph overwrites the output.

        Raises:
            RuntimeError: If the turn cannot be captured.
        """
        if key not in self._graphs:
            while len(self._graphs) >= self._most:
                self._evict()
            self._graphs[key] = self._capture(key, build())
        self._graphs.move_to_end(key)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def clear(self) -> None:
        """Forget all graphs, and return their memory."""
        while self._graphs:
            self._evict()

    def _evict(self) -> None:
        key, (graph, _) = self._graphs.popitem(last=False)
        graph.reset()
        self._bytes.pop(key, None)
        if not self._graphs:
            self._pool = None  # a pool ends with its last graph

    def _capture(self, key: Hashable, turn: DecodeTurn) -> tuple[torch.cuda.CUDAGraph, TurnOutput]:
        """Capture a turn, and compare two replays with two turns that were not captured.

        The sequences are afterwards as they were: keys and values beyond their positions are written again.
        """
        saved = turn.save()
        with torch.cuda.device(self._device), turn.probing(), steady_attention():
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for n in range(_WARM_UP):
                        # A capture that fails leaves more behind than an error that comes before it.
                        guard = HostReadGuard() if n and not turn.is_compiled else nullcontext()
                        with guard:
                            expected = turn.run_probed().table.numbers[:, 0, 0].clone()
            finally:
                current.wait_stream(self._stream)
                turn.restore(saved)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # as the capture does first: what is reserved then is the graph's
            before = torch.cuda.memory_reserved()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads of a server may use the GPU meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    output = turn.run_probed()
            except BaseException:
                torch.cuda.set_stream(current)  # a capture that fails does not go back to it
                if not self._graphs:
                    self._pool = None
                raise
            self._bytes[key] = max(0, torch.cuda.memory_reserved() - before)
            for _ in range(_WARM_UP):
                graph.replay()
            # A value that the graph holds as a constant shows at the second turn. A near tie may go either way.
            same = (output.table.numbers[:, 0, 0] == expected).double().mean()
            turn.restore(saved)
            if float(same) < 0.5:
                raise RuntimeError("replays of the graph choose other tokens")
        return graph, output
