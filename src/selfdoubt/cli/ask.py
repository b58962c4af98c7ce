"""``selfdoubt ask``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.cli.output import ShowAbstained, build_printer
from selfdoubt.errors import ConfigError, require
from selfdoubt.lm import defaults

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def ask(
    questions: Annotated[list[str], typer.Argument(help="One question or more, each in quotes.", show_default=False)],
    model: flags.ModelFlag = None,
    adapter: flags.Adapter = None,
    wrapper: flags.WrapperText = "auto",
    dtype: flags.Dtype = "auto",
    quantize: flags.Quantize = None,
    risk: flags.RiskName = None,
    trust_remote_code: flags.RemoteCode = False,
    answer_from: flags.AnswerFromFlag = None,
    step: flags.StepFlag = "auto",
    prepack: flags.Prepack = None,
    as_json: flags.AsJson = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the most probable token. [default: 0, with several tries 1]", show_default=False),
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw from the smallest set of tokens with this probability.")
    ] = defaults.TOP_P,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = defaults.MAX_TOKENS,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = defaults.SEED,
    candidates: Annotated[
        int | None, typer.Option(help="Give N answers, the most confident first.", metavar="N")
    ] = None,
    until_percentile: Annotated[
        float | None,
        typer.Option(
            help="Answer again until the risk is below this share of the reference answers, in [0, 1].",
            metavar="P",
        ),
    ] = None,
    max_tries: Annotated[
        int, typer.Option(help="Most tries of --until-percentile.", metavar="K")
    ] = defaults.MAX_ATTEMPTS,
    show_withheld: Annotated[
        bool, typer.Option("--show-withheld", help="Where the model is not sure, also show what it would have said.")
    ] = False,
) -> int:
    """Ask questions; the answers stream, each token in the colour of its risk."""
    if candidates is not None and until_percentile is not None:
        raise ConfigError("--candidates and --until-percentile exclude each other: give one of them")
    flags.check_whole_texts(*questions)
    lm = flags.load_lm(
        model, adapter, wrapper, dtype, quantize, risk, trust_remote_code, answer_from, step, prepack=prepack
    )  # fmt: skip
    options: dict[str, Any] = {"max_tokens": max_tokens, "top_p": top_p, "seed": seed, "raw": raw}
    if temperature is not None:
        options["temperature"] = temperature
    several = candidates is not None or until_percentile is not None
    abstained: ShowAbstained = "always" if several else "with notice" if show_withheld else "never"
    output = build_printer(as_json=as_json, abstained=abstained)
    if candidates is not None:
        for question in questions:
            for i, answer in enumerate(lm.candidates(question, candidates, **options)):
                output.whole(question if i == 0 else None, answer)
        return 0
    if until_percentile is not None:
        confident = True
        for question in questions:
            result = lm.generate_until(question, until_percentile, max_tries=max_tries, **options)
            output.whole(question, result.answer)
            output.verdict(result.attempts, until_percentile, confident=result.confident)
            confident &= result.confident
        return 0 if confident else 1
    can_abstain = lm.calibration is not None and lm.calibration.threshold is not None
    for question in questions:
        if can_abstain and not show_withheld:  # an answer that may be hidden cannot be shown while it grows
            output.whole(question, lm.generate(question, **options))
            continue
        stream = lm.stream(question, **options)
        output.begin(question, stream.question)
        for token in stream:
            output.token(token)
        output.end(stream.answer)
    output.compare()
    return 0
