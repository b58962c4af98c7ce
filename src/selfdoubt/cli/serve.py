"""``selfdoubt serve``: the described settings of ``Limits`` and ``ServerSettings`` are flags."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.cli.from_dataclass import build_config, with_flags
from selfdoubt.errors import ConfigError, require
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.http.settings import ServerSettings, read_keys

if TYPE_CHECKING:
    import typer

    from selfdoubt.lm.model import RiskAwareLM
else:
    typer = require("typer", "lm")


@with_flags(Limits, before="replicas")
@with_flags(ServerSettings, before="no_risk")
def serve(
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
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests. [default: its name]", show_default=False)
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that requests must bring, or better a file with one per line; SELFDOUBT_API_KEY is read, too.",
            show_default=False,
        ),
    ] = None,
    no_risk: Annotated[bool, typer.Option("--no-risk", help="Send no risks: OpenAI's fields and no others.")] = False,
    ui: Annotated[bool, typer.Option("--ui", help="Serve the chat page under /, too.")] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may send requests from a browser, or *.", metavar="ORIGIN"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name of this server in requests, while no key is needed.", metavar="NAME"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of a step on a CPU. [default: a core less than there are]", min=1, show_default=False
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            help="Number of engines, each with the model, on Ray; needs the extra 'ray'.", min=1, show_default=False
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to run on; auto for this machine's. [default: a new one]", show_default=False),
    ] = None,
    replica_gpus: Annotated[float, typer.Option(help="GPUs that each replica needs.", min=0)] = 0.0,
    drain: Annotated[float, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 30.0,
    **settings: Any,
) -> int:
    """Serve a model to many clients at once, as OpenAI's API does, with a risk next to every token."""
    limits = build_config(Limits, settings)
    keys = read_keys([*(api_key or []), *filter(None, [os.environ.get("SELFDOUBT_API_KEY")])])
    settings["log_requests"] |= settings["log_prompts"]
    server_settings = build_config(
        ServerSettings,
        settings,
        name=name or str(model or adapter or "pocket"),
        keys=keys,
        risk=not no_risk,
        origins=tuple(cors or ()),
        hosts=tuple(allow_host or ()),
    )
    if replicas is None and (ray_address is not None or replica_gpus):
        raise ConfigError("--ray-address and --replica-gpus are for --replicas N; add it")
    if not 0 <= drain < float("inf"):
        raise ConfigError(f"--drain must be a number of seconds, got {drain}")
    for package in ("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if ui else [])):
        require(package, "serve")
    from selfdoubt.serve.http.process import bind_socket, format_url

    listener = bind_socket(host, port, keys=bool(keys))
    url = format_url(listener)
    access = "needs a key" if keys else "needs no key: only this machine can connect"
    page = f"; the page is at {url}/" if ui else ""
    message = f"selfdoubt serves {server_settings.name} at {url}/v1 ({access}){page}"
    load = partial(
        _load, threads, model, adapter, wrapper, dtype, quantize, risk, trust_remote_code, answer_from, step,
        prepack=prepack,
    )  # fmt: skip
    if ray_address is not None:
        from selfdoubt.serve.ray.token import offer_token

        offer_token()
    if replicas is not None:
        from selfdoubt.serve.ray import cluster

        where = cluster.Cluster(replicas, ray_address, replica_gpus)
        address = listener.getsockname()
        listener.close()  # Ray's proxies listen there
        application = cluster.build_application(load, limits, server_settings, where, drain, ui=ui)
        cluster.run_cluster(
            application, where, address[0], address[1],
            started=lambda: print(f"{message}, {replicas} replicas", flush=True), idle=server_settings.idle_seconds,
        )  # fmt: skip
        return 0
    return _serve_one(load(), limits, server_settings, listener, message, drain, ui=ui)


def _serve_one(
    lm: RiskAwareLM, limits: Limits, settings: ServerSettings, listener: Any, message: str, drain: float, *, ui: bool
) -> int:
    """Serve with one engine in this process, until a signal comes."""
    from selfdoubt.serve.engine.engine import Engine
    from selfdoubt.serve.http.app import create_app
    from selfdoubt.serve.http.metrics import Metrics
    from selfdoubt.serve.http.process import run_server

    metrics = Metrics()
    engine = Engine(lm, limits, metrics)
    app = create_app(engine, settings)
    if ui:
        app = require("selfdoubt.serve.chat", "serve").mount(app, engine, title=settings.name, model=settings.name)
    if settings.log_requests:
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("selfdoubt.serve").setLevel(logging.INFO)
    engine.start(wait=True)
    ended_well = run_server(
        app, listener, engine, drain=drain, started=partial(print, message, flush=True),
        active=lambda: metrics.active, settings=settings,
    )  # fmt: skip
    return 0 if ended_well else 1


def _load(threads: int | None, *model: Any, prepack: bool | None = None) -> RiskAwareLM:
    """Load the model for this process, or for that of a replica."""
    from selfdoubt.serve.engine import memory
    from selfdoubt.serve.engine.threads import limit_threads

    memory.bound_process_memory()
    lm = flags.load_lm(*model, prepack=prepack)
    limit_threads(lm, threads)
    memory.limit_shapes(lm)
    return lm
