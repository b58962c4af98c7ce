"""The command line, one file per command. Heavy imports wait until a command runs, so that help is quick."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

from selfdoubt.errors import MissingExtraError, SelfdoubtError, require

if TYPE_CHECKING:
    import typer
else:
    try:
        typer = require("typer", "lm")
    except MissingExtraError as missing:
        sys.exit(f"selfdoubt: {missing}")

from selfdoubt.cli.ask import ask
from selfdoubt.cli.calibrate import calibrate
from selfdoubt.cli.chat import chat
from selfdoubt.cli.compare import compare
from selfdoubt.cli.doctor import doctor
from selfdoubt.cli.evaluate import evaluate
from selfdoubt.cli.export import export
from selfdoubt.cli.prepare import prepare
from selfdoubt.cli.report import report
from selfdoubt.cli.score import score
from selfdoubt.cli.serve import serve
from selfdoubt.cli.train import train

app = typer.Typer(
    name="selfdoubt",
    help="Language models that know what they don't know: every token with its risk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (ask, chat, serve, score, prepare, train, evaluate, calibrate, report, compare, export, doctor):
    app.command()(command)


def main() -> None:
    """Run a command: exit code 0, 1 for 'not confident', 2 for bad input with one line that says what to do."""
    write_any_text()
    # Typer brings its own copy of click in newer versions: this finds its usage error in both.
    usage_error: Any = typer.BadParameter.__base__
    try:
        code = app(standalone_mode=False)
    except SelfdoubtError as error:
        code = _complain(str(error))
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else "selfdoubt"
        code = _complain(f"{error.format_message().rstrip('.')}; see {command} --help")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, e.g. `| head`
        code = 0
    sys.exit(code or 0)


def write_any_text() -> None:
    """Replace what an output that is not UTF-8 (``PYTHONIOENCODING=cp1252``, a pipe, a log) cannot hold, and half of a
    character anywhere, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def _complain(message: str) -> int:
    print(f"selfdoubt: {' '.join(message.split())}", file=sys.stderr)
    return 2
