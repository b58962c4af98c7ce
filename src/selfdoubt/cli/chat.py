"""``selfdoubt chat``."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Annotated

from selfdoubt.cli import flags
from selfdoubt.errors import ConfigError, require
from selfdoubt.lm import defaults

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def chat(
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
    host: Annotated[str, typer.Option(help="An address of this machine that no other can reach.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 7860,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer, until the page sets another number.")
    ] = defaults.MAX_TOKENS,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
) -> int:
    """Chat on a local web page: every token in the colour of its risk. Nothing leaves this machine."""
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens must be at least 1, got {max_tokens}")
    for module in ("fastapi", "uvicorn"):
        require(module, "serve")
    from selfdoubt.serve.http.process import bind_socket, format_url, run_server

    advice = "use 127.0.0.1, or `selfdoubt serve --ui --api-key KEY` to serve others"
    listener = bind_socket(
        host, port, keys=False, advice=advice
    )  # a port in use is reported before a large model loads
    require("gradio", "serve")
    from fastapi import FastAPI

    from selfdoubt.serve.chat import mount

    lm = flags.load_lm(
        model, adapter, wrapper, dtype, quantize, risk, trust_remote_code, answer_from, step, prepack=prepack
    )  # fmt: skip
    from selfdoubt.serve.engine.engine import Engine
    from selfdoubt.serve.engine.threads import limit_threads

    limit_threads(lm)
    engine = Engine(lm)
    app = mount(FastAPI(openapi_url=None), engine, max_tokens=max_tokens)
    engine.start()
    url = f"{format_url(listener)}/"

    def announce() -> None:
        print(f"Chat at {url}  (Ctrl-C ends it)", flush=True)
        if not no_open and _has_display():
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    run_server(app, listener, engine, drain=5, started=announce)
    return 0


def _has_display() -> bool:
    """Return whether there is a screen to open a browser on."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
