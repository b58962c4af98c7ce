"""Progress bar of long runs over questions, on standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def build_progress(*, quiet: bool = False) -> Progress:
    """Return a bar with counts, the time that has passed and the time that is left.

    Args:
        quiet: Show nothing; as where standard error is not a terminal.
    """
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    return progress.Progress(*columns, console=console, disable=quiet or not console.is_terminal)
