"""Flags that several commands share, and functions that turn their values into a model or a judge."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.errors import ConfigError, require
from selfdoubt.wrapper_text import parse_wrapper_text

if TYPE_CHECKING:
    import typer

    from selfdoubt.data.questions import Question
    from selfdoubt.eval.judges.verdict import Judge
    from selfdoubt.lm.model import RiskAwareLM
else:
    typer = require("typer", "lm")

ModelFlag = Annotated[
    str | None,
    typer.Option(
        help="A model folder, a GGUF file (org/name:file.gguf for one on the hub), a hub name, or 'pocket' for the one "
        "inside this package. [default: the adapter's base, or pocket]",
        show_default=False,
    ),
]
Adapter = Annotated[Path | None, typer.Option(help="An adapter folder, or LoRA that PEFT wrote.")]
WrapperText = Annotated[
    str,
    typer.Option(
        help="auto, none, vote, sample or sculpt, with settings if you like: 'vote:n_voters=5,rank=8'. "
        "auto takes what comes with the adapter or the pocket model, and leaves any other model as it is. "
        "One that you name is untrained: the model itself answers, and its members only disagree."
    ),
]
AnswerFromFlag = Annotated[
    str | None,
    typer.Option(
        "--answer-from",
        help="base: the model itself answers, and voters or samples only say how far they disagree; mean: their mean "
        "answers. [default: the adapter's; base for a --wrapper, whose members are untrained]",
        metavar="base|mean",
        show_default=False,
    ),
]
StepFlag = Annotated[
    str,
    typer.Option(
        "--step",
        help="How steps of decoding run: eager, static (a cache of fixed sizes), captured (CUDA graphs) or compiled. "
        "auto captures on a GPU, and is eager elsewhere.",
        metavar="auto|eager|static|captured|compiled",
    ),
]
Prepack = Annotated[
    bool | None,
    typer.Option(
        "--prepack/--no-prepack",
        help="Keep copies of the weights in a layout that a CPU reads faster. [default: if they take at most a quarter "
        "of the free memory]",
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's own, where the machine computes in it), float32, bfloat16, float16 or float64."
    ),
]
Quantize = Annotated[str | None, typer.Option(help="nf4 for 4-bit weights.")]
RiskName = Annotated[str | None, typer.Option("--risk", help="Name of the answer score that is the risk.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per token, then one for the answer.")]

Data = Annotated[
    str,
    typer.Option(
        help="truthfulqa, nq_open, webquestions, triviaqa, squad2 or pocket; or a file: JSONL, JSON, CSV, TSV or "
        "Parquet with questions and answers; or a name on the hub.",
        show_default=False,
    ),
]
TaskFlag = Annotated[str | None, typer.Option(help="TruthfulQA: gen, mc1 or mc2.", show_default=False)]
AnswerSeparator = Annotated[str | None, typer.Option(help="Separates several answers in one cell, e.g. ';'.")]
Split = Annotated[str | None, typer.Option(help="Split of a set on the hub.", show_default=False)]
JudgeFlag = Annotated[
    str | None,
    typer.Option(
        help="Judge of the answers: exact, f1:0.5, contains, rouge, bleu, choice, regex:PATTERN, column:NAME or llm. "
        "[default: choice for choices, rouge where wrong answers are known, else contains]",
        show_default=False,
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(help="llm: an OpenAI-compatible URL, e.g. http://localhost:8000/v1; its key is in OPENAI_API_KEY."),
]
JudgeModel = Annotated[str | None, typer.Option(help="llm: the judging model's name.")]


def pick_judge(
    spec: str | None,
    questions: Sequence[Question],
    url: str | None,
    model: str | None,
    out: Path,
    column: Callable[[str], dict[str, Any]],
) -> Judge:
    """Return the judge that the flags name; ``column`` reads one more column of the questions' file."""
    from selfdoubt.eval.judges import rules as judges
    from selfdoubt.eval.judges.llm import LLMJudge
    from selfdoubt.eval.run_folder import CACHE

    if (spec == "llm") != (model is not None):
        raise ConfigError("--judge llm and --judge-model NAME go together: give both, or neither")
    if model is None:
        if url is not None:
            raise ConfigError("--judge-url is for --judge llm; add it, and --judge-model NAME")
        spec = judges.choose_default_judge(questions) if spec is None else spec
        kind, _, name = spec.partition(":")
        return judges.build_judge(spec, column=column(name) if kind == "column" and name else None)
    judge = LLMJudge(model, base_url=url, cache=str(out / CACHE))
    out.mkdir(parents=True, exist_ok=True)
    judge.probe()
    return judge


def load_lm(
    model: str | None,
    adapter: Path | None,
    wrapper: str,
    dtype: str,
    quantize: str | None,
    risk: str | None,
    remote: bool,
    answer_from: str | None = None,
    step: str = "auto",
    *,
    prepack: bool | None = None,
    show_note: bool = True,
) -> RiskAwareLM:
    """Load the model that the flags name, and print its note, if it has one, as one line on standard error."""
    silence_output()
    from selfdoubt.errors import UntrainedWarning
    from selfdoubt.lm.model import RiskAwareLM
    from selfdoubt.lm.step_modes import check_step_mode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)  # the note says it, in one line
        lm = RiskAwareLM.load(
            model,
            adapter=adapter,
            wrapper=parse_wrapper(wrapper),
            dtype=dtype,
            quantize=quantize,  # type: ignore[arg-type]
            trust_remote_code=remote,
            risk=risk or None,
            answer_from=answer_from,  # type: ignore[arg-type]
            step=check_step_mode(step),
            prepack=prepack,
        )
    if show_note and lm.note is not None:
        print(f"selfdoubt: note: {lm.note}", file=sys.stderr)
    return lm


def check_whole_texts(*texts: str | None) -> None:
    """Refuse bytes of the command line that are not text in its encoding: no tokenizer takes them."""
    from selfdoubt.data.cells import has_lone_surrogate

    for text in texts:
        if text is not None and has_lone_surrogate(text):
            raise ConfigError(f"{ascii(text)[:80]} holds bytes that are not UTF-8 text; convert it, e.g. with iconv")


def silence_output() -> None:
    """Let only errors of the libraries reach the terminal, and no progress bars."""
    from selfdoubt.compat import silence_libraries

    silence_libraries()


def parse_wrapper(text: str) -> Any:
    """Return the wrapper of a text such as ``vote:n_voters=5,rank=8``; None for "none", "auto" for "auto"."""
    parsed = parse_wrapper_text(text, "auto", "none")
    if isinstance(parsed, str):
        return None if parsed == "none" else parsed
    from selfdoubt.storage import from_json

    return from_json(parsed)
