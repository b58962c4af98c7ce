"""``selfdoubt calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from selfdoubt.cli import flags
from selfdoubt.errors import require

if TYPE_CHECKING:
    import typer

    from selfdoubt.eval.settings import Run
    from selfdoubt.lm.model import RiskAwareLM
else:
    typer = require("typer", "lm")


def calibrate(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders that `selfdoubt evaluate` wrote, all with one model.", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option(help="A new adapter folder. [default: the run's adapter itself]", show_default=False)
    ] = None,
    target_accuracy: Annotated[
        float | None,
        typer.Option(
            help="Also find the threshold above which answers are right at least this often.", show_default=False
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Probability with which the target accuracy is kept.")] = 0.95,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Heads to choose from: score, answer, question, members, state. [default: all that the runs allow]",
            show_default=False,
        ),
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the folds, and of the answers that test the threshold.")] = 0,
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the reports' intervals; 0 keeps the reports.")] = 1000,
    trust_remote_code: flags.RemoteCode = False,
) -> int:
    """Fit the probability that an answer is right on judged answers, and the threshold below which to abstain.

    Of several runs, each with questions of its own, the head is chosen by what transfers to the run that was left out.
    Each run's report is written again, with the probabilities of heads that had not seen the answer.
    """
    require("sklearn", "qa")
    flags.silence_output()
    from selfdoubt import workflow

    def load(run: Run) -> RiskAwareLM:
        adapter = None if run.adapter is None else Path(run.adapter)
        wrapper, dtype = run.wrapper or "auto", run.dtype or "auto"
        return flags.load_lm(run.model, adapter, wrapper, dtype, run.quantize, None, trust_remote_code, run.answer_from)

    result = workflow.calibrate(
        runs,
        out=out,
        lm=load,
        target_accuracy=target_accuracy,
        confidence=confidence,
        candidates=None if heads is None else [name.strip() for name in heads.split(",")],
        folds=folds,
        seed=seed,
        draws=draws,
    )
    for text in result.lines():
        print(text)
    return 0
