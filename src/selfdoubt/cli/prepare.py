"""``selfdoubt prepare``: every setting of ``PreparationConfig`` is a flag."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.cli.from_dataclass import build_config, with_flags
from selfdoubt.errors import require
from selfdoubt.preparation.config import PreparationConfig
from selfdoubt.wrapper_text import parse_wrapper_text

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


@with_flags(PreparationConfig)
def prepare(
    out: Annotated[Path, typer.Option(help="The adapter folder to write; an interrupted run resumes.")],
    model: flags.ModelFlag = None,
    adapter: flags.Adapter = None,
    wrapper: Annotated[
        str,
        typer.Option(
            help="none; or vote or sample, with settings if you like: untrained members with the largest noise that "
            "keeps the model's own answers, which it still gives itself."
        ),
    ] = "none",
    density: Annotated[
        bool,
        typer.Option(
            "--density/--no-density", help="Fit statistics of the features on the answers: how unusual is a token's?"
        ),
    ] = True,
    questions: Annotated[
        str | None,
        typer.Option(
            help="A file like those of evaluate --data, without labels if you like, or a .txt with one question per "
            "line. [default: a list of this package, on many subjects]",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask a random subset of this size.", show_default=False)] = None,
    question_column: Annotated[
        str | None, typer.Option(help="Column of the question, where its name does not say it.", show_default=False)
    ] = None,
    context_column: Annotated[
        str | None, typer.Option(help="Column of a passage to read first.", show_default=False)
    ] = None,
    split: flags.Split = None,
    dtype: flags.Dtype = "auto",
    quantize: flags.Quantize = None,
    trust_remote_code: flags.RemoteCode = False,
    step: flags.StepFlag = "auto",
    prepack: flags.Prepack = None,
    **settings: Any,
) -> int:
    """Make a model risk-aware without labels and without training: answer questions, and keep the scores' quantiles.

    With the adapter, ask, chat and serve show percentiles: the share of these answers that were less risky.
    """
    flags.silence_output()
    from selfdoubt.data.questions import Columns
    from selfdoubt.preparation.run import prepare as run

    config = build_config(PreparationConfig, settings, density=density)
    members = _parse_members(wrapper)
    columns = Columns(question=question_column, context=context_column)
    sources = tuple(path for path in (adapter, model) if path is not None)
    load = partial(
        flags.load_lm, model, adapter, "auto", dtype, quantize, None, trust_remote_code, step=step, prepack=prepack,
        show_note=False,
    )  # fmt: skip
    result = run(
        load, out, questions, wrapper=members, config=config, limit=limit, columns=columns, split=split, sources=sources
    )
    for text in result.lines():
        print(text)
    return 0


def _parse_members(text: str) -> Any:
    """Return the wrapper to add, whose noise is searched unless the text says how much; None for "none"."""
    parsed = parse_wrapper_text(text, "none")
    if isinstance(parsed, str):
        return None
    from selfdoubt.storage import from_json

    defaults: dict[str, dict[str, Any]] = {
        "vote": {"rank": 16, "weight_noise": "auto"},
        "sample": {"distribution": {"name": "Bernoulli", "p": "auto"}},
    }
    return from_json({**defaults.get(parsed["method"], {}), **parsed})
