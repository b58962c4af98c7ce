"""``selfdoubt serve``."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.errors import ConfigError, require
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.http.settings import Settings, read_keys

if TYPE_CHECKING:
    import typer

    from selfdoubt.lm.model import RiskAwareLM
else:
    typer = require("typer", "lm")

_LIMITS, _SETTINGS = Limits(), Settings()


def serve(
    model: flags.ModelFlag = None,
    adapter: flags.Adapter = None,
    wrapper: flags.WrapperText = "auto",
    dtype: flags.Dtype = "auto",
    quantize: flags.Quantize = None,
    risk: flags.RiskName = None,
    trust_remote_code: flags.RemoteCode = False,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. [default: its name]", show_default=False)
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that requests must bring, or better a file with one a line; SELFDOUBT_API_KEY is read, too.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of requests that name none; 0 takes the most probable token.")
    ] = _SETTINGS.temperature,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer, of chats that name no number.")
    ] = _SETTINGS.max_tokens,
    no_risk: Annotated[bool, typer.Option("--no-risk", help="Tell no risks: OpenAI's fields and no others.")] = False,
    withhold: Annotated[
        bool, typer.Option("--withhold", help="Say 'I'm not sure.' in place of answers that the model is not sure of.")
    ] = False,
    ui: Annotated[bool, typer.Option("--ui", help="Serve the chat page under /, too.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of a step on a CPU. [default: a core less than there are]", min=1, show_default=False
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Most sequences decoded side by side.")] = _LIMITS.batch,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens in the cache for them.")] = _LIMITS.batch_tokens,
    queue: Annotated[int, typer.Option(help="Most requests that wait; more are sent away with 429.")] = _LIMITS.queue,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt. [default: the model's context]", show_default=False)
    ] = None,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer that may be asked for.")] = _LIMITS.answer_tokens,
    choices: Annotated[int, typer.Option(help="Most answers to one request.")] = _LIMITS.choices,
    timeout: Annotated[float, typer.Option(help="Seconds for a request, waiting included.")] = _LIMITS.timeout,
    replicas: Annotated[
        int | None,
        typer.Option(help="So many engines, each with the model, on Ray (extra [ray]).", min=1, show_default=False),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to run on; auto for this machine's. [default: a new one]", show_default=False),
    ] = None,
    replica_gpus: Annotated[float, typer.Option(help="GPUs that each replica needs.", min=0)] = 0.0,
    body_bytes: Annotated[int, typer.Option(help="Longest body of a request.")] = _SETTINGS.body_bytes,
    connections: Annotated[
        int, typer.Option(help="Most connections; beyond, the one that has waited longest without a request goes.")
    ] = _SETTINGS.connections,
    header_seconds: Annotated[
        float, typer.Option(help="Seconds in which the head of a request must be complete.")
    ] = _SETTINGS.header_seconds,
    idle_seconds: Annotated[
        float, typer.Option(help="Seconds that a connection stays open without a further request.")
    ] = _SETTINGS.idle_seconds,
    drain: Annotated[float, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 30.0,
    cors: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may ask from a browser, or *.", metavar="ORIGIN")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name of this server in requests, while no key is needed.", metavar="NAME"),
    ] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="One line a request, without its text.")] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what is asked, too.")] = False,
) -> int:
    """Serve a model to many at once, as OpenAI's API does, with a risk beside every token."""
    limits = Limits(batch, batch_tokens, queue, prompt_tokens, answer_tokens, choices, timeout)
    keys = read_keys([*(api_key or []), *filter(None, [os.environ.get("SELFDOUBT_API_KEY")])])
    settings = Settings(
        name=name or str(model or adapter or "pocket"),
        keys=keys,
        temperature=temperature,
        max_tokens=max_tokens,
        risk=not no_risk,
        withhold=withhold,
        origins=tuple(cors or ()),
        hosts=tuple(allow_host or ()),
        body_bytes=body_bytes,
        connections=connections,
        header_seconds=header_seconds,
        idle_seconds=idle_seconds,
        log_requests=log_requests or log_prompts,
        log_prompts=log_prompts,
    )
    if replicas is None and (ray_address is not None or replica_gpus):
        raise ConfigError("--ray-address and --replica-gpus are for --replicas N; add it")
    if not 0 <= drain < float("inf"):
        raise ConfigError(f"--drain must be a number of seconds, got {drain}")
    for package in ("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if ui else [])):
        require(package, "serve")
    from selfdoubt.serve.http.process import bind, run, url_of

    own = bind(host, port, keys=bool(keys))
    access = "needs a key" if keys else "needs no key: only this machine can connect"
    page = f"; the page is at {url_of(own)}/" if ui else ""
    line = f"selfdoubt serves {settings.name} at {url_of(own)}/v1 ({access}){page}"
    load = partial(_load, threads, model, adapter, wrapper, dtype, quantize, risk, trust_remote_code)
    if ray_address is not None:
        from selfdoubt.serve.ray.token import offer_token

        offer_token()
    if replicas is not None:
        from selfdoubt.serve.ray import cluster

        where = cluster.Cluster(replicas, ray_address, replica_gpus)
        address = own.getsockname()
        own.close()  # Ray's proxies listen there
        cluster.run(
            cluster.application(load, limits, settings, where, drain, ui=ui), where, address[0], address[1],
            started=lambda: print(f"{line}, {replicas} replicas", flush=True), idle=idle_seconds,
        )  # fmt: skip
        return 0
    lm = load()
    from selfdoubt.serve.engine.engine import Engine
    from selfdoubt.serve.http.app import create_app
    from selfdoubt.serve.http.metrics import Metrics

    metrics = Metrics()
    engine = Engine(lm, limits, metrics)
    app = create_app(engine, settings)
    if ui:
        app = require("selfdoubt.serve.chat", "serve").mount(app, engine, title=settings.name, model=settings.name)
    if settings.log_requests:
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("selfdoubt.serve").setLevel(logging.INFO)
    engine.start(wait=True)
    begun = partial(print, line, flush=True)
    ended = run(
        app, own, engine, drain=drain, started=begun, active=lambda: metrics.active, settings=settings
    )  # fmt: skip
    return 0 if ended else 1


def _load(threads: int | None, *model: Any) -> RiskAwareLM:
    """For this process, or for that of a replica."""
    from selfdoubt.serve.engine import memory
    from selfdoubt.serve.engine.threads import share

    memory.bound_process()
    lm = flags.load_lm(*model)
    share(lm, threads)
    memory.limit_shapes(lm)
    return lm
