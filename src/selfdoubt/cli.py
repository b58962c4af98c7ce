"""The command line: ``selfdoubt ask`` and ``selfdoubt score``. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.errors import ConfigError, LoadError, MissingExtraError, SelfdoubtError, require

if TYPE_CHECKING:
    import typer

    from selfdoubt.lm.answer import Answer, Token
    from selfdoubt.lm.model import RiskAwareLM
else:
    try:
        typer = require("typer", "lm")
    except MissingExtraError as missing:
        sys.exit(f"selfdoubt: {missing}")

app = typer.Typer(
    name="selfdoubt",
    help="Language models that know what they don't know: every token with its risk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="A model folder, a hub name, or 'pocket' for the one inside this package.")]
Adapter = Annotated[Path | None, typer.Option(help="A folder that selfdoubt.save wrote.")]
WrapperText = Annotated[
    str,
    typer.Option(
        help="auto, none, vote, sample or sculpt, with settings if you like: 'vote:n_voters=5,rank=8'. "
        "auto takes what comes with the model or the adapter, else three fresh voters."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16, float16 or float64.")]
Quantize = Annotated[str | None, typer.Option(help="nf4 for 4-bit weights.")]
RiskName = Annotated[str | None, typer.Option("--risk", help="Name of the answer score that is the risk.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a token, then one for the answer.")]


@app.command()
def ask(
    questions: Annotated[list[str], typer.Argument(help="One question or more, each in quotes.", show_default=False)],
    model: Model = "pocket",
    adapter: Adapter = None,
    wrapper: WrapperText = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    risk: RiskName = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the most probable token. [default: 0, with several tries 1]", show_default=False),
    ] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set of tokens with this probability.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    candidates: Annotated[int | None, typer.Option(help="Give N answers, the least risky first.", metavar="N")] = None,
    until_percentile: Annotated[
        float | None,
        typer.Option(
            help="Answer again until the risk is below this share of the reference answers, in [0, 1].",
            metavar="P",
        ),
    ] = None,
    max_tries: Annotated[int, typer.Option(help="Most tries of --until-percentile.", metavar="K")] = 10,
) -> int:
    """Ask questions; the answers stream, each token in the colour of its risk."""
    if candidates is not None and until_percentile is not None:
        raise ConfigError("--candidates and --until-percentile exclude each other: give one of them")
    lm = _load(model, adapter, wrapper, dtype, quantize, risk, trust_remote_code)
    options: dict[str, Any] = {"max_tokens": max_tokens, "top_p": top_p, "seed": seed, "raw": raw}
    if temperature is not None:
        options["temperature"] = temperature
    output = _JsonLines() if as_json else _Lines()
    if candidates is not None:
        for question in questions:
            for i, answer in enumerate(lm.candidates(question, candidates, **options)):
                output.whole(question if i == 0 else None, answer)
        return 0
    if until_percentile is not None:
        confident = True
        for question in questions:
            tried = lm.generate_until(question, until_percentile, max_tries=max_tries, **options)
            output.whole(question, tried.answer)
            output.verdict(tried.tries, until_percentile, confident=tried.confident)
            confident &= tried.confident
        return 0 if confident else 1
    for question in questions:
        stream = lm.stream(question, **options)
        output.begin(question, stream.question)
        for token in stream:
            output.token(token)
        output.end(stream.answer)
    output.compare()
    return 0


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="A text file, or - for standard input.")] = "-",
    question: Annotated[str | None, typer.Option(help="What the text answers.")] = None,
    model: Model = "pocket",
    adapter: Adapter = None,
    wrapper: WrapperText = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    risk: RiskName = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> int:
    """Colour text that exists by its risk."""
    text = _read(file)
    lm = _load(model, adapter, wrapper, dtype, quantize, risk, trust_remote_code)
    answer = lm.score(text, question)
    (_JsonLines() if as_json else _Lines()).whole(question, answer)
    return 0


class _Lines:
    """Output for people."""

    def __init__(self) -> None:
        from selfdoubt.terminal import Screen

        self.screen = Screen()
        self.screen.legend()
        self.seen: list[tuple[str, Answer]] = []
        self.asked = ""

    def begin(self, question: str, tokens: list[Token]) -> None:
        self.asked = question
        self.screen.console.print()
        self.screen.question(question, tokens)

    def token(self, token: Token) -> None:
        self.screen.token(token)

    def end(self, answer: Answer) -> None:
        self.screen.answer(answer)
        self.seen.append((self.asked, answer))

    def whole(self, question: str | None, answer: Answer) -> None:
        if question is None:
            self.screen.console.print()
        else:
            self.begin(question, list(answer.question))
        for token in answer.tokens:
            self.token(token)
        self.end(answer)

    def verdict(self, tries: int, wanted: float, *, confident: bool) -> None:
        sure = f"  confident after {tries} {'try' if tries == 1 else 'tries'}"
        self.screen.console.print(sure if confident else f"  not confident: no answer of {tries} below {wanted:.0%}")

    def compare(self) -> None:
        if len(self.seen) > 1:
            self.screen.comparison(*zip(*self.seen, strict=True))


class _JsonLines:
    """Output for programs: one object a line."""

    def begin(self, question: str, tokens: list[Token]) -> None:  # noqa: ARG002
        for token in tokens:
            self._print({"type": "token", "part": "question", **asdict(token)})

    def token(self, token: Token) -> None:
        self._print({"type": "token", "part": "answer", **asdict(token)})

    def end(self, answer: Answer) -> None:
        self._print({"type": "answer", **answer.to_dict()})

    def whole(self, question: str | None, answer: Answer) -> None:
        self.begin(question or "", list(answer.question))
        for token in answer.tokens:
            self.token(token)
        self.end(answer)

    def verdict(self, tries: int, wanted: float, *, confident: bool) -> None:
        self._print({"type": "verdict", "confident": confident, "tries": tries, "percentile": wanted})

    def compare(self) -> None:
        pass

    def _print(self, item: dict[str, Any]) -> None:
        print(json.dumps(item, ensure_ascii=False, allow_nan=False), flush=True)


def _load(
    model: str,
    adapter: Path | None,
    wrapper: str,
    dtype: str,
    quantize: str | None,
    risk: str | None,
    remote: bool,
) -> RiskAwareLM:
    require("transformers", "lm").utils.logging.set_verbosity_error()
    require("huggingface_hub", "lm").utils.logging.set_verbosity_error()
    from selfdoubt.lm.answer import DEFAULT_RISK
    from selfdoubt.lm.model import RiskAwareLM

    return RiskAwareLM.load(
        model,
        adapter=adapter,
        wrapper=_wrapper(wrapper),
        dtype=dtype,
        quantize=quantize,  # type: ignore[arg-type]
        trust_remote_code=remote,
        risk=risk or DEFAULT_RISK,
    )


def _wrapper(text: str) -> Any:
    """A wrapper from ``name:setting=value,...``; values are JSON, or else words."""
    name, _, settings = text.partition(":")
    if name in ("auto", "none") and not settings:
        return "auto" if name == "auto" else None
    from selfdoubt.storage import METHODS, from_json

    if name not in METHODS:
        raise ConfigError(f"--wrapper must be auto, none, {', '.join(METHODS)}, got {name!r}")
    return from_json({"method": name, **dict(_settings(settings))})


def _settings(text: str) -> Iterator[tuple[str, Any]]:
    for item in filter(None, text.split(",")):
        key, found, value = item.partition("=")
        if not found:
            raise ConfigError(f"a wrapper's settings look like n_voters=5,rank=8, got {item!r}")
        try:
            yield key.strip(), json.loads(value)
        except ValueError:
            yield key.strip(), value


def _read(file: str) -> str:
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8")
    except OSError as error:
        raise LoadError(
            f"{file} cannot be read ({error.strerror}); give a text file, or - for standard input"
        ) from None
    except UnicodeDecodeError as error:
        raise LoadError(f"{file} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None


def main() -> None:
    """Run a command: exit code 0, 1 for 'not confident', 2 for bad input with one line that says what to do."""
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


def _complain(message: str) -> int:
    print(f"selfdoubt: {' '.join(message.split())}", file=sys.stderr)
    return 2
