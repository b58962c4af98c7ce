"""``selfdoubt score``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from selfdoubt.cli import flags
from selfdoubt.cli.output import build_printer
from selfdoubt.errors import ConfigError, LoadError, require

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def score(
    file: Annotated[
        str, typer.Argument(help="A text file, or - for standard input; or answers as .jsonl, with --out.")
    ] = "-",
    question: Annotated[str | None, typer.Option(help="The question that the text answers.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Score every line of FILE, a .jsonl of questions and answers, into this file.")
    ] = None,
    question_column: Annotated[str, typer.Option(help="--out: the key of the question.")] = "question",
    answer_column: Annotated[str, typer.Option(help="--out: the key of the answer.")] = "answer",
    batch_size: Annotated[int, typer.Option(help="--out: answers per batch.")] = 32,
    model: flags.ModelFlag = None,
    adapter: flags.Adapter = None,
    wrapper: flags.WrapperText = "auto",
    dtype: flags.Dtype = "auto",
    quantize: flags.Quantize = None,
    risk: flags.RiskName = None,
    trust_remote_code: flags.RemoteCode = False,
    answer_from: flags.AnswerFromFlag = None,
    as_json: flags.AsJson = False,
) -> int:
    """Colour existing text by its risk; or score answers of any other system, one per line."""
    if out is None and file.endswith(".jsonl"):
        raise ConfigError(f"{file} is a file of answers; say where the scored ones go, e.g. --out scored.jsonl")
    if out is not None:
        if question is not None or as_json:
            raise ConfigError("--out scores a file of answers, which --question and --json do not go with")
        from selfdoubt.eval.rescore import read_answer_rows, rescore

        rows = read_answer_rows(file, out, question_column)
        lm = flags.load_lm(model, adapter, wrapper, dtype, quantize, risk, trust_remote_code, answer_from)
        failed = rescore(
            lm, rows, out, question_column=question_column, answer_column=answer_column, batch_size=batch_size
        )
        print(f"{out}: {len(rows) - failed} of {len(rows)} answers scored")
        if failed:
            count = "1 answer has" if failed == 1 else f"{failed} answers have"
            print(f'selfdoubt: {count} no score; the reason is under "note"', file=sys.stderr)
        return 1 if failed else 0
    flags.check_whole_texts(question)
    text = _read(file)
    lm = flags.load_lm(model, adapter, wrapper, dtype, quantize, risk, trust_remote_code, answer_from)
    answer = lm.score(text, question)
    build_printer(as_json=as_json).whole(question, answer)
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
