"""``selfdoubt train``: every setting of ``TrainConfig`` is a flag."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from selfdoubt.cli import flags
from selfdoubt.errors import require
from selfdoubt.train.config import TrainConfig, read_config

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def train(config: Path | None = None, **settings: Any) -> int:
    """Fine-tune a language model that knows its risk, and write its adapter folder."""
    chosen = read_config(config, {name: value for name, value in settings.items() if value is not None})
    require("lightning", "train")
    flags.quiet()
    from selfdoubt.train import fit

    fit(chosen)
    return 0


def _flag(setting: Field[Any], kind: Any) -> inspect.Parameter:
    """A flag that is None unless given, so that a config file's value stands where no flag does."""
    text = setting.metadata["help"]
    if setting.default is not MISSING and setting.default is not None:
        text += f" [default: {str(setting.default).lower() if kind is bool else setting.default}]"
    # The dash keeps typer from making up a negative flag's name of its own.
    names = [f"--{setting.name.replace('_', '-')}"]
    if kind is bool:
        names[0] += f"/--no-{setting.name.replace('_', '-')}"
    option = typer.Option(*names, help=text, show_default=False)
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _signature() -> inspect.Signature:
    """Typer reads flags off a signature: this one is made of the config's fields."""
    kinds = get_type_hints(TrainConfig)
    file = typer.Option("--config", help="A TOML file with settings; flags win.", show_default=False)
    config = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, file]
    )
    return inspect.Signature([config, *(_flag(f, kinds[f.name]) for f in fields(TrainConfig))])


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {name: p.annotation for name, p in _signature().parameters.items()}
