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
from selfdoubt.serve.engine.client import Desk
from selfdoubt.serve.engine.request import Job
from selfdoubt.serve.http.auth import Access
from selfdoubt.serve.http.encoders import Encoders, size_of
from selfdoubt.serve.http.metrics import Metrics
from selfdoubt.serve.http.settings import Settings
from selfdoubt.serve.http.streaming import EventStream, gather, prompt_tokens, told, unless_gone, updates
from selfdoubt.serve.openai import responses, schema
from selfdoubt.serve.openai.errors import SERVER, GoneError, RequestError, fault_of
from selfdoubt.serve.openai.format import Teller
from selfdoubt.serve.openai.params import Plan, check_model, plan, withholds
from selfdoubt.serve.openai.requests import ChatRequest, CompletionRequest, ScoreRequest, complaint
from selfdoubt.serve.openai.schema import describe_replies
from selfdoubt.serve.openai.score import Scorer, of_given

log = logging.getLogger("selfdoubt.serve")
router = APIRouter()


@dataclass
class House:
    """What the endpoints share."""

    engine: Desk
    settings: Settings
    metrics: Metrics
    scorer: Scorer
    encoders: Encoders
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Changes with the code and the model."""
        parts = f"{selfdoubt.__version__} {self.settings.name} {self.engine.front.architecture}"
        return "fp_" + hashlib.sha256(parts.encode()).hexdigest()[:10]


def create_app(engine: Desk, settings: Settings | None = None) -> FastAPI:
    """The application that ``selfdoubt serve`` runs.

    Args:
        engine: Has been started. What its meter counts is told at ``/metrics`` where the meter is a ``Metrics``.
        settings: How it behaves.

    Raises:
        ConfigError: If answers are to be withheld and the model has no threshold to do so.
    """
    settings = settings or Settings()
    if settings.withhold and not withholds(engine.front):
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
    encoders = Encoders(engine.limits.queue)
    app.state.house = House(engine, settings, metrics, Scorer(engine, encoders), encoders)
    app.state.fingerprint = app.state.house.fingerprint
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(GoneError, _gone)
    for kind in (RequestError, SelfdoubtError, Exception):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(Access, settings=settings, metrics=metrics)
    if settings.origins:  # outermost, so that a browser may read refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.openapi = partial(schema.schema, app, keys=bool(settings.keys))  # type: ignore[method-assign]
    return app


@router.post("/v1/chat/completions", responses=describe_replies(responses.ChatCompletion, responses.ChatChunk))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a chat."""
    return await _answer(body, request)


@router.post("/v1/completions", responses=describe_replies(responses.Completion, responses.TextChunk))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue texts."""
    return await _answer(body, request)


async def _answer(body: ChatRequest | CompletionRequest, request: Request) -> Response:
    house: House = request.app.state.house
    engine, settings = house.engine, house.settings
    wanted = plan(body, settings, engine.limits, engine.front)
    if settings.log_prompts:
        log.info("prompt %s", json.dumps(wanted.questions, ensure_ascii=False))
    chat = isinstance(body, ChatRequest)
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": settings.name,
        "system_fingerprint": request.app.state.fingerprint,
    }
    teller = Teller(engine.front, wanted, chat, head)
    jobs: list[Job] = []
    try:
        await unless_gone(request.receive, _ask(house, wanted, request.scope.get("client_id", ""), jobs))
        if wanted.stream:
            rest = updates(jobs)
            first = await unless_gone(request.receive, anext(rest))  # what ends it before then has a status of its own
            events = told(teller, jobs, first, rest)
            stream, jobs = EventStream(events, jobs, wanted.timeout + 30), []
            return stream
        answers = await unless_gone(request.receive, gather(jobs, wanted.n))
        return await asyncio.to_thread(lambda: JSONResponse(teller.whole(answers, prompt_tokens(jobs))))
    finally:
        for job in jobs:
            job.cancel()


async def _ask(house: House, wanted: Plan, client: str, jobs: list[Job]) -> None:
    engine = house.engine
    try:
        async with asyncio.timeout(wanted.timeout):
            for question in wanted.questions:
                engine.check_room()
                ask = partial(
                    engine.ask, question, n=wanted.n, alternatives=wanted.alternatives, client=client,
                    timeout=wanted.timeout, **wanted.options,
                )  # fmt: skip
                jobs.append(await house.encoders.run(ask, size_of(question), undo=Job.cancel))
    except TimeoutError:
        raise DeadlineError(f"the prompt was not read within {wanted.timeout:g} seconds; try again later") from None


@router.post("/v1/score", responses=describe_replies(responses.Scores))
async def score(body: ScoreRequest, request: Request) -> Response:
    """The risk of one text or several, each the answer to a question or to nothing."""
    house: House = request.app.state.house
    check_model(body.model, house.settings)
    items = body.input if isinstance(body.input, list) else [body.input]
    limits = house.engine.limits
    work = house.scorer.score(items, raw=bool(body.raw), timeout=min(body.timeout or limits.timeout, limits.timeout))
    found = await unless_gone(request.receive, work)

    def told() -> JSONResponse:
        data = [of_given(house.engine.front, i, answer) for i, answer in enumerate(found)]
        return JSONResponse({"object": "list", "model": house.settings.name, "data": data})

    return await asyncio.to_thread(told)  # thousands of tokens take a while to write


@router.get("/v1/models", responses=describe_replies(responses.Models))
async def models(request: Request) -> Response:
    """The models that can be asked: one."""
    return JSONResponse({"object": "list", "data": [_model(request.app.state.house)]})


@router.get("/v1/models/{name:path}", responses=describe_replies(responses.Model))
async def model(name: str, request: Request) -> Response:
    """One model."""
    check_model(name, request.app.state.house.settings)
    return JSONResponse(_model(request.app.state.house))


def _model(house: House) -> dict[str, Any]:
    front = house.engine.front
    plain = {"id": house.settings.name, "object": "model", "created": house.created, "owned_by": "selfdoubt"}
    if not house.settings.risk:
        return plain
    threshold = None if front.calibration is None else front.calibration.threshold
    risk = {"name": front.risk, "token_risk": front.token_risk, "calibrated": front.calibration is not None}
    return {**plain, "risk": {**risk, "threshold": threshold}}


@router.get("/healthz", responses={200: {"model": responses.Status}, 503: {"model": responses.Error}})
async def healthz(request: Request) -> Response:
    """Whether the process is of use; 503 where it has to be started again."""
    failure = request.app.state.house.engine.failure
    if failure is not None:
        raise RequestError(503, f"the engine has failed ({type(failure).__name__}); start the server again", SERVER)
    return JSONResponse({"status": "ok"})


@router.get("/readyz", responses={200: {"model": responses.Status}, 503: {"model": responses.Error}})
async def readyz(request: Request) -> Response:
    """Whether a request would be taken now."""
    engine: Desk = request.app.state.house.engine
    if engine.ready:
        return JSONResponse({"status": "ready"})
    why = "is starting or closing" if engine.failure is None else f"has failed ({type(engine.failure).__name__})"
    raise RequestError(503, f"the engine {why}", SERVER, code="engine_unavailable")


@router.get("/metrics", response_class=PlainTextResponse, responses={401: {"model": responses.Error}})
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    found: Metrics = request.app.state.house.metrics
    return Response(found.text(), media_type=found.media_type)


def _reply(fault: RequestError) -> JSONResponse:
    return JSONResponse(fault.body, fault.status, fault.headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = complaint(error.errors())
    return _reply(RequestError(400, message, param=param))


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers: Mapping[str, str] = error.headers or {}
    return _reply(RequestError(error.status_code, str(error.detail), headers=headers))


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(_: Request, error: Exception) -> Response:
    return _reply(fault_of(error))
