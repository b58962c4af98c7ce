"""``selfdoubt score``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from selfdoubt.cli import flags
from selfdoubt.cli.output import printer
from selfdoubt.errors import LoadError, require

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def score(
    file: Annotated[str, typer.Argument(help="A text file, or - for standard input.")] = "-",
    question: Annotated[str | None, typer.Option(help="What the text answers.")] = None,
    model: flags.Model = None,
    adapter: flags.Adapter = None,
    wrapper: flags.WrapperText = "auto",
    dtype: flags.Dtype = "auto",
    quantize: flags.Quantize = None,
    risk: flags.RiskName = None,
    trust_remote_code: flags.RemoteCode = False,
    as_json: flags.AsJson = False,
) -> int:
    """Colour text that exists by its risk."""
    text = _read(file)
    lm = flags.load_lm(model, adapter, wrapper, dtype, quantize, risk, trust_remote_code)
    answer = lm.score(text, question)
    printer(as_json=as_json).whole(question, answer)
    return 0


def _read(file: str) -> str:
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8")
    except OSError as error:
        raise LoadError(
            f"{file} cannot be read ({error.strerror}); give a text file, or - for standard input"
        ) from None
    except UnicodeDecodeError as error:
        raise LoadError(f"{file} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None
