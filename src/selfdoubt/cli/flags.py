"""Flags that several commands share, and what they mean."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.errors import ConfigError, require

if TYPE_CHECKING:
    import typer

    from selfdoubt.lm.model import RiskAwareLM
else:
    typer = require("typer", "lm")

Model = Annotated[
    str | None,
    typer.Option(
        help="A model folder, a hub name, or 'pocket' for the one inside this package. [default: the adapter's base, "
        "or pocket]",
        show_default=False,
    ),
]
Adapter = Annotated[Path | None, typer.Option(help="An adapter folder, or LoRA that PEFT wrote.")]
WrapperText = Annotated[
    str,
    typer.Option(
        help="auto, none, vote, sample or sculpt, with settings if you like: 'vote:n_voters=5,rank=8'. "
        "auto takes what comes with the model or the adapter, else three fresh voters."
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
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a token, then one for the answer.")]


def load_lm(
    model: str | None,
    adapter: Path | None,
    wrapper: str,
    dtype: str,
    quantize: str | None,
    risk: str | None,
    remote: bool,
) -> RiskAwareLM:
    """The model that the flags name."""
    quiet()
    from selfdoubt.lm.answer import DEFAULT_RISK
    from selfdoubt.lm.model import RiskAwareLM

    return RiskAwareLM.load(
        model,
        adapter=adapter,
        wrapper=parse_wrapper(wrapper),
        dtype=dtype,
        quantize=quantize,  # type: ignore[arg-type]
        trust_remote_code=remote,
        risk=risk or DEFAULT_RISK,
    )


def quiet() -> None:
    """Only errors of the libraries reach the terminal, and no progress bars."""
    transformers = require("transformers", "lm")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    require("huggingface_hub", "lm").utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it tells of kernels it can miss


def parse_wrapper(text: str) -> Any:
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
