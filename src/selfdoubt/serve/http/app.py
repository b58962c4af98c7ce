"""The web application: OpenAI's endpoints over an engine, and those for operators."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

import selfdoubt
from selfdoubt.errors import ConfigError, DeadlineError, SelfdoubtError
from selfdoubt.serve.engine.client import EngineClient
from selfdoubt.serve.engine.request import RequestHandle, cancel_on_exit
from selfdoubt.serve.http.auth import AccessMiddleware
from selfdoubt.serve.http.encoders import EncoderThreads, measure_prompt
from selfdoubt.serve.http.metrics import Metrics
from selfdoubt.serve.http.settings import ServerSettings
from selfdoubt.serve.http.streaming import (
    EventStream,
    collect_answers,
    count_prompt_tokens,
    merge_updates,
    run_until_disconnect,
    stream_events,
)
from selfdoubt.serve.openai import responses
from selfdoubt.serve.openai.errors import SERVER_ERROR, ClientDisconnectedError, RequestError, to_request_error
from selfdoubt.serve.openai.format import ResponseFormatter
from selfdoubt.serve.openai.params import GenerationParams, PromptInput, build_params, can_abstain, check_model
from selfdoubt.serve.openai.requests import ChatRequest, CompletionRequest, ScoreRequest, describe_validation_error
from selfdoubt.serve.openai.schema import build_schema, describe_replies
from selfdoubt.serve.openai.score import Scorer, format_score

log = logging.getLogger("selfdoubt.serve")
router = APIRouter()


@dataclass
class AppState:
    """Objects that the endpoints share."""

    engine: EngineClient
    settings: ServerSettings
    metrics: Metrics
    scorer: Scorer
    encoders: EncoderThreads
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """A text that changes with the code and the model."""
        text = f"{selfdoubt.__version__} {self.settings.name} {self.engine.front.architecture}"
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]


def create_app(engine: EngineClient, settings: ServerSettings | None = None) -> FastAPI:
    """Return the application that ``selfdoubt serve`` runs.

    Args:
        engine: A started engine. If its stats are a ``Metrics``, ``/metrics`` shows them.
        settings: Settings of the server.

    Raises:
        ConfigError: If answers are to be replaced where the model abstains, and it has no threshold to do so.
    """
    settings = settings or ServerSettings()
    if settings.hide_abstained and not can_abstain(engine.front):
        raise ConfigError(
            "--withhold needs a model whose calibration has a threshold; run `selfdoubt calibrate` on its adapter first"
        )
    metrics = engine.stats if isinstance(engine.stats, Metrics) else Metrics()
    metrics.watch(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.shared.encoders.close()

    app = FastAPI(
        title="selfdoubt", version=selfdoubt.__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="OpenAI's chat and text completions, with a risk next to every token.",
    )  # fmt: skip
    encoders = EncoderThreads(engine.limits.queue)
    app.state.shared = AppState(engine, settings, metrics, Scorer(engine, encoders), encoders)
    app.state.fingerprint = app.state.shared.fingerprint
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, _reply_invalid)
    app.add_exception_handler(HTTPException, _reply_http_error)
    app.add_exception_handler(ClientDisconnectedError, _reply_disconnected)
    for kind in (RequestError, SelfdoubtError, Exception):
        app.add_exception_handler(kind, _reply_error)
    app.add_middleware(AccessMiddleware, settings=settings, metrics=metrics)
    if settings.origins:  # outermost, so that a browser may read refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.openapi = partial(build_schema, app, keys=bool(settings.keys))  # type: ignore[method-assign]
    return app


@router.post("/v1/chat/completions", responses=describe_replies(responses.ChatCompletion, responses.ChatChunk))
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a chat."""
    return await _answer(body, request)


@router.post("/v1/completions", responses=describe_replies(responses.Completion, responses.TextChunk))
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue texts."""
    return await _answer(body, request)


async def _answer(body: ChatRequest | CompletionRequest, request: Request) -> Response:
    shared: AppState = request.app.state.shared
    engine, settings = shared.engine, shared.settings
    params = build_params(body, settings, engine.limits, engine.front)
    if settings.log_prompts:
        log.info("prompt %s", json.dumps(params.prompts, ensure_ascii=False))
    head = {
        "id": f"{'chatcmpl' if params.chat else 'cmpl'}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": settings.name,
        "system_fingerprint": request.app.state.fingerprint,
    }
    formatter = ResponseFormatter(engine.front, params, head)
    handles: list[RequestHandle] = []
    with cancel_on_exit(handles):
        work = _submit(shared, params, request.scope.get("client_id", ""), handles)
        await run_until_disconnect(request.receive, work)
        prompt_tokens = count_prompt_tokens(handles)
        if params.stream:
            updates = merge_updates([*handles])
            # An error before the first update has a status of its own.
            first = await run_until_disconnect(request.receive, anext(updates))
            events = stream_events(formatter, prompt_tokens, first, updates)
            stream = EventStream(events, [*handles], params.timeout + 30)
            handles.clear()  # from here on they are the stream's to cancel
            return stream
        answers = await run_until_disconnect(request.receive, collect_answers(handles, len(params.seeds)))
        return await asyncio.to_thread(lambda: JSONResponse(formatter.format_response(answers, prompt_tokens)))


async def _submit(shared: AppState, params: GenerationParams, client: str, handles: list[RequestHandle]) -> None:
    """Encode each prompt in a thread and submit a request for it; its handle is added to ``handles``."""
    engine = shared.engine

    def submit(prompt: PromptInput) -> RequestHandle:
        return engine.submit(params.build_request(engine.front, prompt, engine.limits, client))

    try:
        async with asyncio.timeout(params.timeout):
            for prompt in params.prompts:
                engine.check_capacity()
                work, size = partial(submit, prompt), measure_prompt(prompt)
                handles.append(await shared.encoders.run(work, size, undo=RequestHandle.cancel))
    except TimeoutError:
        raise DeadlineError(f"the prompt was not read within {params.timeout:g} seconds; try again later") from None


@router.post("/v1/score", responses=describe_replies(responses.ScoreList))
async def score_texts(body: ScoreRequest, request: Request) -> Response:
    """Return the risk of one text or several, each the answer to a question or to nothing."""
    shared: AppState = request.app.state.shared
    check_model(body.model, shared.settings)
    items = body.input if isinstance(body.input, list) else [body.input]
    timeout = shared.engine.limits.clamp_timeout(body.timeout)
    work = shared.scorer.score(items, raw=bool(body.raw), timeout=timeout)
    answers = await run_until_disconnect(request.receive, work)

    def reply() -> JSONResponse:
        data = [format_score(shared.engine.front, i, answer) for i, answer in enumerate(answers)]
        return JSONResponse({"object": "list", "model": shared.settings.name, "data": data})

    return await asyncio.to_thread(reply)  # thousands of tokens take a while to write


@router.get("/v1/models", responses=describe_replies(responses.ModelList))
async def list_models(request: Request) -> Response:
    """Return the models that this server runs: one."""
    return JSONResponse({"object": "list", "data": [_describe_model(request.app.state.shared)]})


@router.get("/v1/models/{name:path}", responses=describe_replies(responses.ModelInfo))
async def get_model(name: str, request: Request) -> Response:
    """Return one model."""
    check_model(name, request.app.state.shared.settings)
    return JSONResponse(_describe_model(request.app.state.shared))


def _describe_model(shared: AppState) -> dict[str, Any]:
    front = shared.engine.front
    plain = {"id": shared.settings.name, "object": "model", "created": shared.created, "owned_by": "selfdoubt"}
    if not shared.settings.risk:
        return plain
    threshold = None if front.calibration is None else front.calibration.threshold
    risk = {"name": front.answer_risk, "token_risk": front.token_risk, "calibrated": front.calibration is not None}
    return {**plain, "risk": {**risk, "threshold": threshold}}


@router.get("/healthz", responses={200: {"model": responses.Status}, 503: {"model": responses.ErrorReply}})
async def check_health(request: Request) -> Response:
    """Check that the process works; 503 if it has to be started again."""
    failure = request.app.state.shared.engine.failure
    if failure is not None:
        message = f"the engine has failed ({type(failure).__name__}); start the server again"
        raise RequestError(503, message, SERVER_ERROR)
    return JSONResponse({"status": "ok"})


@router.get("/readyz", responses={200: {"model": responses.Status}, 503: {"model": responses.ErrorReply}})
async def check_ready(request: Request) -> Response:
    """Check that a request would be accepted now."""
    engine: EngineClient = request.app.state.shared.engine
    if engine.ready:
        return JSONResponse({"status": "ready"})
    why = "is starting or closing" if engine.failure is None else f"has failed ({type(engine.failure).__name__})"
    raise RequestError(503, f"the engine {why}", SERVER_ERROR, code="engine_unavailable")


@router.get("/metrics", response_class=PlainTextResponse, responses={401: {"model": responses.ErrorReply}})
async def get_metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' format."""
    metrics: Metrics = request.app.state.shared.metrics
    return Response(metrics.text(), media_type=metrics.media_type)


def _reply(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _reply_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = describe_validation_error(error.errors())
    return _reply(RequestError(400, message, param=param))


async def _reply_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers: Mapping[str, str] = error.headers or {}
    return _reply(RequestError(error.status_code, str(error.detail), headers=headers))


async def _reply_disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # the client does not read it


async def _reply_error(_: Request, error: Exception) -> Response:
    return _reply(to_request_error(error))
