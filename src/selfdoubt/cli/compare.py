"""``selfdoubt compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from selfdoubt.cli.output import to_json_line
from selfdoubt.errors import require

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def compare(
    a: Annotated[Path, typer.Argument(help="A folder that `selfdoubt evaluate` wrote.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another, which was asked some of the same questions.", show_default=False)],
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the confidence intervals.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print all comparisons as JSON.")] = False,
) -> int:
    """Put two runs side by side, on the questions that both were asked."""
    require("scipy", "qa")
    from selfdoubt.report.compare import compare_runs

    comparison = compare_runs(a, b, draws=draws)
    print(to_json_line(comparison.to_json()) if as_json else "\n".join(comparison.lines()))
    return 0
