"""``selfdoubt doctor``."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.cli.output import to_json_line
from selfdoubt.errors import require

if TYPE_CHECKING:
    import typer

    from selfdoubt.lm.doctor import Diagnosis
else:
    typer = require("typer", "lm")


def doctor(
    model: flags.ModelFlag = None,
    adapter: flags.Adapter = None,
    wrapper: flags.WrapperText = "auto",
    dtype: flags.Dtype = "auto",
    quantize: flags.Quantize = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:1. [default: a GPU where there is one]", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences that are served side by side.", min=1, max=4096)] = 32,
    steps: Annotated[int, typer.Option(help="Decoding steps to time.", min=1, max=4096)] = 8,
    trust_remote_code: flags.RemoteCode = False,
    answer_from: flags.AnswerFromFlag = None,
    step: flags.StepFlag = "auto",
    prepack: flags.Prepack = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Measure a model on this machine, memory and time, and say what would make it faster."""
    flags.silence_output()
    from selfdoubt.errors import UntrainedWarning
    from selfdoubt.lm.doctor import diagnose
    from selfdoubt.lm.hardware import read_device
    from selfdoubt.lm.model import RiskAwareLM
    from selfdoubt.lm.step_modes import check_step_mode

    where = read_device(device)
    loading: dict[str, Any] = {
        "adapter": adapter, "wrapper": flags.parse_wrapper(wrapper), "dtype": dtype, "quantize": quantize,
        "trust_remote_code": trust_remote_code, "answer_from": answer_from,
        "step": check_step_mode(step), "prepack": prepack,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)  # of risks, which are not looked at here
        lm = RiskAwareLM.load(model, device=where, **loading)
    diagnosis = diagnose(lm, batch=batch, steps=steps)
    if as_json:
        print(to_json_line({"type": "diagnosis", **diagnosis.to_json()}))
    else:
        print_diagnosis(diagnosis)
    return 0


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print a diagnosis for people: a table of what was found, then what to change."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in list_findings(diagnosis):
        table.add_row(Text(name, style="bold" if console.is_terminal else ""), Text(text))
    console.print(table)
    console.print()
    if not diagnosis.advice:
        console.print(Text("Nothing to change."))
    for number, advice in enumerate(diagnosis.advice, 1):
        console.print(Text(f"{number}. {advice}"))


def list_findings(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Return the rows of the table: a name and its text."""
    weights, cache, steps, device = diagnosis.weights, diagnosis.cache, diagnosis.steps, diagnosis.device
    dtypes = ", ".join(f"{name} {format_bytes(size)}" for name, size in weights.bytes_by_dtype.items())
    rows = "1 row" if cache.members == 1 else f"{cache.members} rows"
    processor = [f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"]
    processor += [f"copies {device.bandwidth / 1e9:,.1f} GB/s"]
    if device.threads is not None:
        processor += [f"{device.threads} of {device.cores} cores compute"]
    processor += [f"bfloat16 by {', '.join(device.bf16)}" if device.bf16 else "bfloat16 is emulated"]
    limit = "" if cache.context is None else f" (the model reads {cache.context:,})"
    return [
        ("model", diagnosis.model or "unnamed"),
        ("wrapper", diagnosis.wrapper),
        ("device", f"{device.name}: {', '.join(processor)}"),
        (
            "weights",
            f"{weights.parameters:,} parameters, {format_bytes(weights.bytes)} ({dtypes})"
            + (", quantised" if weights.quantized else "")
            + (f"; prepacked copies {format_bytes(diagnosis.prepacked_bytes)}" if diagnosis.prepacked_bytes else ""),
        ),
        ("added", f"{diagnosis.added_parameters:,} parameters, {format_bytes(diagnosis.added_bytes)}"),
        (
            "key-value cache",
            f"{format_bytes(cache.bytes_per_1000_tokens)} per 1,000 tokens and member, {rows} per sequence",
        ),
        (
            "longest context",
            f"{cache.longest_alone:,} tokens alone, {cache.longest_in_batch:,} each for {cache.batch} sequences{limit}",
        ),
        (
            "graphs",
            f"{diagnosis.graphs.count}, {format_bytes(diagnosis.graphs.bytes)}; {diagnosis.graphs.note}"
            if diagnosis.graphs.count else f"none: {diagnosis.graphs.note}",
        ),
        ("attention", f"{diagnosis.attention}; kernels: {', '.join(device.attention)}"),
        (
            "step",
            f"{1e3 * steps.measured:.2f} ms per token with risk, {1e3 * steps.plain:.2f} ms for the plain row "
            f"({steps.measured / steps.plain:.2f}x)",
        ),
        (
            "bandwidth",
            f"a step reads {format_bytes(steps.bytes_read)}, which takes at least {1e3 * steps.predicted:.2f} ms: "
            f"{steps.share:.0%} of the bandwidth is reached",
        ),
        ("prompts", f"{steps.prefill_tokens_per_second:,.0f} tokens per second read and scored"),
    ]  # fmt: skip


def format_bytes(size: float) -> str:
    """Return a number of bytes with a unit: 1,234 B, 12.3 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"
