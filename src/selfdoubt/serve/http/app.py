"""The web application: OpenAI's endpoints over an engine, and what operators look at."""

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
from selfdoubt.serve.engine.request import RequestHandle
from selfdoubt.serve.http.auth import AccessMiddleware
from selfdoubt.serve.http.encoders import EncoderThreads, measure_prompt
from selfdoubt.serve.http.metrics import Metrics
from selfdoubt.serve.http.settings import ServerSettings
from selfdoubt.serve.http.streaming import (
    EventStream,
    collect_answers,
    count_prompt_tokens,
    stream_events,
    run_until_disconnect,
    merge_updates,
)
from selfdoubt.serve.openai import responses, schema
from selfdoubt.serve.openai.errors import SERVER_ERROR, ClientDisconnectedError, RequestError, to_request_error
from selfdoubt.serve.openai.format import ResponseFormatter
from selfdoubt.serve.openai.params import GenerationParams, check_model, build_params, can_abstain
from selfdoubt.serve.openai.requests import ChatRequest, CompletionRequest, ScoreRequest, describe_validation_error
from selfdoubt.serve.openai.schema import describe_replies
from selfdoubt.serve.openai.score import Scorer, format_score

log = logging.getLogger("selfdoubt.serve")
router = APIRouter()


@dataclass
class AppState:
    """What the endpoints share."""

    engine: EngineClient
    settings: ServerSettings
    metrics: Metrics
    scorer: Scorer
    encoders: EncoderThreads
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Changes with the code and the model."""
        parts = f"{selfdoubt.__version__} {self.settings.name} {self.engine.lm.model}"
        return "fp_" + hashlib.sha256(parts.encode()).hexdigest()[:10]


def create_app(engine: EngineClient, settings: ServerSettings | None = None) -> FastAPI:
    """The application that ``selfdoubt serve`` runs.

    Args:
        engine: Has been started. What its meter counts is told at ``/metrics`` where the meter is a ``Metrics``.
        settings: How it behaves.

    Raises:
        ConfigError: If answers are to be withheld and the model has no threshold to do so.
    """
    settings = settings or ServerSettings()
    if settings.withhold and not can_abstain(engine.lm):
        raise ConfigError(
            "--withhold needs a model whose calibration has a threshold; run `selfdoubt calibrate` on its adapter first"
        )
    metrics = engine.meter if isinstance(engine.meter, Metrics) else Metrics()
    metrics.watch(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.house.encoders.close()

    app = FastAPI(
        title="selfdoubt", version=selfdoubt.__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="OpenAI's chat and text completions, with a risk beside every token.",
    )  # fmt: skip
    encoders = EncoderThreads(engine.limits.queue)
    app.state.house = AppState(engine, settings, metrics, Scorer(engine, encoders), encoders)
    app.state.fingerprint = app.state.house.fingerprint
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnectedError, _gone)
    for kind in (RequestError, SelfdoubtError, Exception):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(AccessMiddleware, settings=settings, metrics=metrics)
    if settings.origins:  # outermost, so that a browser may read refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.openapi = partial(schema.build_schema, app, keys=bool(settings.keys))  # type: ignore[method-assign]
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
    house: AppState = request.app.state.house
    engine, settings = house.engine, house.settings
    wanted = build_params(body, settings, engine.limits, engine.lm)
    if settings.log_prompts:
        log.info("prompt %s", json.dumps(wanted.questions, ensure_ascii=False))
    chat = isinstance(body, ChatRequest)
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": settings.name,
        "system_fingerprint": request.app.state.fingerprint,
    }
    teller = ResponseFormatter(engine.lm, wanted, chat, head)
    jobs: list[RequestHandle] = []
    try:
        await run_until_disconnect(request.receive, _ask(house, wanted, request.scope.get("client_id", ""), jobs))
        if wanted.stream:
            rest = merge_updates(jobs)
            first = await run_until_disconnect(
                request.receive, anext(rest)
            )  # what ends it before then has a status of its own
            events = stream_events(teller, jobs, first, rest)
            stream, jobs = EventStream(events, jobs, wanted.timeout + 30), []
            return stream
        answers = await run_until_disconnect(request.receive, collect_answers(jobs, wanted.n))
        return await asyncio.to_thread(lambda: JSONResponse(teller.whole(answers, count_prompt_tokens(jobs))))
    finally:
        for job in jobs:
            job.cancel()


async def _ask(house: AppState, wanted: GenerationParams, client: str, jobs: list[RequestHandle]) -> None:
    engine = house.engine
    try:
        async with asyncio.timeout(wanted.timeout):
            for question in wanted.questions:
                engine.check_room()
                ask = partial(
                    engine.ask, question, n=wanted.n, alternatives=wanted.alternatives, client=client,
                    timeout=wanted.timeout, **wanted.options,
                )  # fmt: skip
                jobs.append(await house.encoders.run(ask, measure_prompt(question), undo=RequestHandle.cancel))
    except TimeoutError:
        raise DeadlineError(f"the prompt was not read within {wanted.timeout:g} seconds; try again later") from None


@router.post("/v1/score", responses=describe_replies(responses.ScoreList))
async def score_texts(body: ScoreRequest, request: Request) -> Response:
    """The risk of one text or several, each the answer to a question or to nothing."""
    house: AppState = request.app.state.house
    check_model(body.model, house.settings)
    items = body.input if isinstance(body.input, list) else [body.input]
    limits = house.engine.limits
    work = house.scorer.score(items, raw=bool(body.raw), timeout=min(body.timeout or limits.timeout, limits.timeout))
    found = await run_until_disconnect(request.receive, work)

    def told() -> JSONResponse:
        data = [format_score(house.engine.lm, i, answer) for i, answer in enumerate(found)]
        return JSONResponse({"object": "list", "model": house.settings.name, "data": data})

    return await asyncio.to_thread(told)  # thousands of tokens take a while to write


@router.get("/v1/models", responses=describe_replies(responses.ModelList))
async def list_models(request: Request) -> Response:
    """The models that can be asked: one."""
    return JSONResponse({"object": "list", "data": [_model(request.app.state.house)]})


@router.get("/v1/models/{name:path}", responses=describe_replies(responses.ModelInfo))
async def get_model(name: str, request: Request) -> Response:
    """One model."""
    check_model(name, request.app.state.house.settings)
    return JSONResponse(_model(request.app.state.house))


def _model(house: AppState) -> dict[str, Any]:
    lm = house.engine.lm
    plain = {"id": house.settings.name, "object": "model", "created": house.created, "owned_by": "selfdoubt"}
    if not house.settings.risk:
        return plain
    threshold = None if lm.calibration is None else lm.calibration.threshold
    return {**plain, "risk": {"name": lm.risk, "token_risk": lm.token_risk, "calibrated": lm.calibration is not None,
                              "threshold": threshold}}  # fmt: skip


@router.get("/healthz", responses={200: {"model": responses.Status}, 503: {"model": responses.ErrorReply}})
async def check_health(request: Request) -> Response:
    """Whether the process is of use; 503 where it has to be started again."""
    failure = request.app.state.house.engine.failure
    if failure is not None:
        raise RequestError(
            503, f"the engine has failed ({type(failure).__name__}); start the server again", SERVER_ERROR
        )
    return JSONResponse({"status": "ok"})


@router.get("/readyz", responses={200: {"model": responses.Status}, 503: {"model": responses.ErrorReply}})
async def check_ready(request: Request) -> Response:
    """Whether a request would be taken now."""
    engine: EngineClient = request.app.state.house.engine
    if engine.ready:
        return JSONResponse({"status": "ready"})
    why = "is starting or closing" if engine.failure is None else f"has failed ({type(engine.failure).__name__})"
    raise RequestError(503, f"the engine {why}", SERVER_ERROR, code="engine_unavailable")


@router.get("/metrics", response_class=PlainTextResponse, responses={401: {"model": responses.ErrorReply}})
async def get_metrics(request: Request) -> Response:
    """For Prometheus."""
    found: Metrics = request.app.state.house.metrics
    return Response(found.text(), media_type=found.media_type)


def _reply(fault: RequestError) -> JSONResponse:
    return JSONResponse(fault.body, fault.status, fault.headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = describe_validation_error(error.errors())
    return _reply(RequestError(400, message, param=param))


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers: Mapping[str, str] = error.headers or {}
    return _reply(RequestError(error.status_code, str(error.detail), headers=headers))


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(_: Request, error: Exception) -> Response:
    return _reply(to_request_error(error))
