"""``selfdoubt train``: every setting of ``TrainConfig`` is a flag."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.cli.from_dataclass import with_flags
from selfdoubt.errors import require
from selfdoubt.train.config import TrainConfig, load_config
from selfdoubt.train.wrapper_settings import WrapperFlags

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


@with_flags(TrainConfig, WrapperFlags, optional=True)
def train(
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file with settings; flags win.", show_default=False)
    ] = None,
    **settings: Any,
) -> int:
    """Fine-tune a language model that knows its risk, and write its adapter folder."""
    chosen = load_config(config, {name: value for name, value in settings.items() if value is not None})
    require("lightning", "train")
    flags.silence_output()
    from selfdoubt.train import fit

    fit(chosen)
    return 0
