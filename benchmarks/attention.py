"""Kernels of attention: SDPA's backends against FlexAttention, at the shapes of decoding steps and of training.

A step has one query per row and a cache of fixed length, of which a mask hides the last quarter, as a static cache
does; grouped heads read shared keys. Training runs whole rows forward and backward: one text per row ("causal"), or
four texts packed into each ("packed"). All kernels of a case compute the same: a row has its largest difference from
the formula in float32, and one that cannot run says why.

    python -m benchmarks.attention [--models 135m 1b] [--lengths 128 2048 8192] [--minutes 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import arms, results
from selfdoubt.lm.attention_backends import steady_attention
from selfdoubt.lm.grouped_queries import attend_grouped

KEYS = ("model", "case", "rows", "length", "arm")
ARMS = {
    "sdpa": "SDPA, as PyTorch chooses without cuDNN",
    "sdpa-math": "SDPA, math",
    "sdpa-flash": "SDPA, flash",
    "sdpa-efficient": "SDPA, memory-efficient",
    "sdpa-cudnn": "SDPA, cuDNN",
    "sdpa-grouped": "SDPA, heads that share a key as queries of one head",
    "flex": "FlexAttention, compiled",
}
_BACKENDS = {
    "sdpa-math": SDPBackend.MATH, "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}  # fmt: skip
#: Texts that are packed into a row of training.
_TEXTS = 4
#: Runs in one CUDA graph, so that launching them does not count.
_RUNS = 20


@dataclass(frozen=True)
class Shape:
    """The sizes of one measurement."""

    model: str
    case: Literal["step", "causal", "packed"]
    rows: int
    length: int

    @property
    def about(self) -> dict[str, Any]:
        """The fields of a row that name it."""
        return {"model": self.model, "case": self.case, "rows": self.rows, "length": self.length}


def build_inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Build queries, keys and values in bfloat16, ``(rows, heads, columns, width)``."""
    sizes = arms.SHAPES[shape.model]
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    width = sizes.get("head_dim", sizes["hidden_size"] // heads)
    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int, columns: int) -> Tensor:
        x = torch.randn(shape.rows, count, columns, width, generator=generator, device=device)
        return x.bfloat16().requires_grad_(shape.case != "step")

    return (
        draw(heads, 1 if shape.case == "step" else shape.length),
        draw(groups, shape.length),
        draw(groups, shape.length),
    )


def build_mask(shape: Shape, device: torch.device) -> Tensor | None:
    """Build the mask of a case, True where a query sees a key; None for a causal one."""
    columns = torch.arange(shape.length, device=device)
    if shape.case == "step":
        return (columns < 3 * shape.length // 4)[None, None, None].expand(shape.rows, 1, 1, -1)
    text = columns * _TEXTS // shape.length
    causal = columns[:, None] >= columns
    return (causal & (text[:, None] == text))[None, None] if shape.case == "packed" else None


def build_flex(shape: Shape, device: torch.device) -> Callable[..., Tensor]:
    """Build FlexAttention for a case; it is compiled at its first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    used = torch.full((shape.rows,), 3 * shape.length // 4, device=device)

    def is_cached(row: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
        return key < used[row]

    def is_earlier(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def is_earlier_in_text(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query * _TEXTS // shape.length == key * _TEXTS // shape.length)

    sees = {"step": is_cached, "causal": is_earlier, "packed": is_earlier_in_text}[shape.case]
    queries = 1 if shape.case == "step" else shape.length
    mask = create_block_mask(sees, shape.rows, None, queries, shape.length, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        return y

    return run


def build_kernel(arm: str, shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Build the attention of an arm."""
    if arm == "flex":
        return build_flex(shape, device)
    mask = build_mask(shape, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    def run_steady(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with steady_attention():  # as steps and training run it
            return run(q, k, v)

    def run_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(_BACKENDS[arm]):
            return run(q, k, v)

    def run_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > 1:
            raise ValueError("only for one query per row")
        with steady_attention():
            return attend_grouped(q, k, v, mask)

    return {"sdpa": run_steady, "sdpa-grouped": run_grouped}.get(arm, run_on)


def measure(arm: str, shape: Shape, device: torch.device, seconds: float) -> results.Row:
    """Return the row of an arm: medians of seconds per call, forward and backward where it trains."""
    inputs = build_inputs(shape, device)
    kernel = build_kernel(arm, shape, device)

    def call() -> Tensor:
        y = kernel(*inputs)
        if shape.case != "step":
            torch.autograd.grad(y.sum(), inputs)
        return y.detach()

    begin = time.perf_counter()
    difference = (call().float() - _compute_reference(shape, inputs, device)).abs().max().item()
    first = time.perf_counter() - begin
    times = _time_on_gpu(call, seconds) if device.type == "cuda" else _time_on_cpu(call, seconds)
    spread = quantiles(times, n=4)[::2]
    return {"median": median(times), "spread": spread, "difference": difference, "first": first, "calls": len(times)}


def _compute_reference(shape: Shape, inputs: tuple[Tensor, Tensor, Tensor], device: torch.device) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v in float32, row by row."""
    mask = build_mask(shape, device)
    rows = []
    with torch.no_grad():
        for row in range(shape.rows):
            q, k, v = (x[row].float() for x in inputs)
            shared = len(q) // len(k)
            scores = (q @ k.repeat_interleave(shared, 0).transpose(1, 2)) * q.shape[-1] ** -0.5
            if mask is None:
                hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=device).triu(1)
            else:
                hidden = ~mask[row % len(mask), 0]
            rows.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(shared, 0))
    return torch.stack(rows)


def _time_on_cpu(call: Callable[[], Tensor], seconds: float) -> list[float]:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 1000):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def _time_on_gpu(call: Callable[[], Tensor], seconds: float) -> list[float]:
    """Return seconds per call, many of which are one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_RUNS):
            call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _RUNS)
    return times


def add_ratios(rows: list[results.Row]) -> list[results.Row]:
    """Return rows with their ratios to SDPA as PyTorch chooses it, at the same sizes."""
    base = {tuple(r[key] for key in KEYS[:-1]): r["median"] for r in rows if r["arm"] == "sdpa" and "median" in r}
    with_ratios = []
    for row in rows:
        to = base.get(tuple(row[key] for key in KEYS[:-1]))
        with_ratios.append(row | ({"ratio": row["median"] / to} if to and "median" in row else {}))
    return with_ratios


def table(record: dict[str, Any]) -> str:
    """Return the rows of one device as Markdown."""
    lines = []
    for row in add_ratios(record["rows"]):
        about = f"{row['model']}, {row['case']}, {row['rows']} x {row['length']}: {ARMS[row['arm']]}"
        if "error" in row:
            lines.append([about, row["error"][:60], "", ""])
            continue
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        lines.append([about, f"{row['median'] * 1e6:,.0f}", ratio, f"{row['difference']:.1e}"])
    head = ["heads of, case, rows x length: kernel", "microseconds", "to SDPA", "largest difference from float32"]
    text = (
        f"{record['device']}; bfloat16, medians; training is forward and backward; commit {record['commit']}, torch "
        f"{record['versions']['torch']}."
    )
    return results.markdown(head, lines) + "\n\n" + text


def list_shapes(models: list[str], lengths: list[int], rows: int, training: list[int]) -> list[Shape]:
    """Return the shapes to measure: steps of all lengths, then training rows."""
    steps = [Shape(model, "step", rows, length) for model in models for length in lengths]
    cases: tuple[Literal["causal", "packed"], ...] = ("causal", "packed")
    return steps + [Shape(model, case, rows, length) for model in models for length in training for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1b"], choices=list(arms.SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 2048, 8192], help="of the cache in a step")
    parser.add_argument("--training", nargs="*", type=int, default=[512], help="lengths of rows in training")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--minutes", type=float, default=None, help="begin none after this time")
    parser.add_argument("--again", action="store_true", help="measure again what this commit has measured")
    chosen = parser.parse_args()
    until = None if chosen.minutes is None else time.monotonic() + 60 * chosen.minutes
    rows, device = results.RowFile("attention", KEYS, again=chosen.again), arms.choose_device()
    for shape in list_shapes(chosen.models, chosen.lengths, chosen.rows, chosen.training):
        for arm in chosen.arms:
            if rows.has(**shape.about, arm=arm) or (until is not None and time.monotonic() > until):
                continue
            try:
                row = measure(arm, shape, device, chosen.seconds)
            except Exception as error:  # a kernel that cannot run a shape says so, in its own kind of error
                row = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
            rows.add({**shape.about, "arm": arm, **row})
            print(rows.rows[-1], flush=True)
    results.tables()
    print(rows.path)


if __name__ == "__main__":
    main()
