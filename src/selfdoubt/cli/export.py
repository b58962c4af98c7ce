"""``selfdoubt export``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from selfdoubt.cli import flags
from selfdoubt.errors import ConfigError, require

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, or LoRA that PEFT wrote.", show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(help="The folder to write: new, empty, or exported before.", show_default=False),
    ],
    peft: Annotated[
        bool, typer.Option("--peft", help="Plain PEFT adapters: OUT/voter-0, ... for voters; OUT itself for LoRA.")
    ] = False,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="The model with LoRA merged into it; OUT/adapter is the rest of the adapter."),
    ] = False,
    checkpoint: Annotated[
        bool,
        typer.Option(
            "--checkpoint",
            help="ADAPTER is a checkpoint of a run, sharded or not: the adapter it would leave. It is read as data; "
            "objects that could run code are refused.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: a folder, a GGUF file or a hub name. [default: the one that the adapter names]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="--merge: auto, float32, bfloat16, float16 or float64.")] = "auto",
    push: Annotated[
        str | None,
        typer.Option(help="Upload OUT to the hub as user/name, with the token in HF_TOKEN.", metavar="NAME"),
    ] = None,
    trust_remote_code: flags.RemoteCode = False,
) -> int:
    """Write an adapter in the form that other tools load."""
    if peft + merge + checkpoint != 1:
        raise ConfigError(
            "give --peft (adapters for PEFT and vLLM), --merge (a whole model) or --checkpoint (of a run), one of them"
        )
    flags.silence_output()
    from selfdoubt.lm.adapters import export as exports
    from selfdoubt.lm.adapters.new_folder import check_upload, new_folder, upload

    if push is not None:
        check_upload(push)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="full deviations become LoRA")
        if checkpoint:
            require("lightning", "train")
            from selfdoubt.train import export_checkpoint

            with new_folder(out, {"kind": "checkpoint"}, (adapter,)) as new:
                export_checkpoint(adapter, new)
            written = [out]
        elif peft:
            written = exports.export_peft(adapter, out, base=model, trust_remote_code=trust_remote_code)
        else:
            written = [
                exports.export_merged(
                    adapter, out, base=model, name=push, dtype=dtype, trust_remote_code=trust_remote_code
                )
            ]
            written += [out / exports.ADAPTER] if (out / exports.ADAPTER).is_dir() else []
    for warning in caught:
        print(f"selfdoubt: {warning.message}", file=sys.stderr)
    for folder in written:
        print(folder)
    if push is not None:
        print(upload(out, push))
    return 0
