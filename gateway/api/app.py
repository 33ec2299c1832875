"""The FastAPI application of an api process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Request
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from gateway.api import errors, request_log, unsupported
from gateway.api.answer import Format, Source, collect, events
from gateway.api.disconnect import ClientGoneError, while_connected
from gateway.api.drain import Drain
from gateway.api.event_stream import EventStream
from gateway.api.formats import ChatFormat, CompletionFormat
from gateway.api.gate import BodyLimit, Caller, Gate
from gateway.api.job import Job, chat_job, completion_job
from gateway.api.limits import Limits
from gateway.api.metrics import CONTENT_TYPE, Metrics
from gateway.api.openapi import answers, describe
from gateway.api.request_context import RequestContext
from gateway.api.request_record import RequestRecord
from gateway.api.requests import ChatRequest, CompletionRequest, SamplingRequest
from gateway.api.responses import ChatCompletion, Completion, Health, ModelCard, ModelList, Version
from gateway.api.resumption import HEADER, ResumedSource
from gateway.api.served_model import ApiConfig, ServedModel
from gateway.api.tokenization import tokenization_routes
from gateway.api.tracking import Demands, TrackedPool
from gateway.link import GatewayLostError, GatewayPool
from recovery.journal import Journal

Status = Callable[[], Awaitable[dict[str, Any]]]
"""Reports the application's state as what JSON can hold."""

_CLIENT_GONE = 499
_EXPOSED = [
    "x-request-id",
    "retry-after",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
]
"""Headers that web pages may read."""
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk or an error, in JSON; at last `[DONE]`."}},
    "required": ["data"],
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}}}

Timeout = Annotated[
    float | None,
    Header(alias="x-request-timeout", gt=0, allow_inf_nan=False, description="Seconds the whole answer may take."),
]


def create_app(
    config: ApiConfig,
    pool: GatewayPool,
    status: Status,
    limits: Limits | None = None,
    journal: Journal | None = None,
) -> FastAPI:
    """The OpenAI-compatible API of the model in ``config.store``, answered by the gateways of `pool`.

    When the application shuts down, running requests get ``config.policy.drain_s`` to finish, then the pool is closed.
    Raise StoreError for a store without what the api needs.
    """
    model = ServedModel.load(config)
    drain, metrics = Drain(), Metrics(config.model_name)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with pool, limits or contextlib.nullcontext(), journal or contextlib.nullcontext():
            yield
            await drain.finish(config.policy.drain_s, pool.cut)

    def ended(record: RequestRecord) -> None:
        metrics.answered(record)
        request_log.write(record)

    app = FastAPI(title="Evermoe", version=version("evermoe"), lifespan=lifespan, redirect_slashes=False)
    _surround(app, config, drain, limits, ended)
    errors.install(app)
    app.include_router(_generation(_Desk(model, pool, metrics, config, journal)))
    app.include_router(_models(model))
    app.include_router(_state(pool, status, metrics, drain))
    describe(app, keys=bool(config.keys))
    return app


def _surround(
    app: FastAPI, config: ApiConfig, drain: Drain, limits: Limits | None, ended: Callable[[RequestRecord], None]
) -> None:
    """The layers around the routes, the innermost first."""
    policy = config.policy
    app.add_middleware(BodyLimit, limit=int(policy.max_body_mib * (1 << 20)), timeout_s=policy.body_timeout_s)
    app.add_middleware(Gate, keys=config.keys, drain=drain, limits=limits)
    if policy.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=policy.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(RequestContext, answer=config.request_ids, ended=ended)


class _Desk:
    """Takes a request's job in and has it answered."""

    def __init__(
        self, model: ServedModel, pool: GatewayPool, metrics: Metrics, config: ApiConfig, journal: Journal | None
    ) -> None:
        self.model = model
        self._pool = pool
        self._metrics = metrics
        self._longest_s = config.policy.request_timeout_s
        self._journal = journal

    def check(self, body: SamplingRequest, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise ApiError for another model, and for what is not served."""
        self.model.check_name(body.model)
        unsupported.refuse(body.model_extra, neutral)

    async def answer(
        self, job: Job, form: Format, body: SamplingRequest, timeout: float | None, request: Request
    ) -> Response:
        """The answer to a request that is valid."""
        record = RequestRecord.of(request.scope)
        record.stream, record.prompt_tokens = job.stream, job.prompt_tokens
        await Caller.of(request.scope).admit()
        self._metrics.prompt_tokens.inc(job.prompt_tokens)
        deadlines = [seconds for seconds in (timeout, self._longest_s) if seconds is not None]
        demands = Demands(priority=body.priority or 0, deadline_s=min(deadlines, default=None))
        source: Source = TrackedPool(self._pool, record, self._metrics, demands)
        key = request.headers.get(HEADER)
        if key is not None and self._journal is not None:
            source = ResumedSource(source, self._journal, key, record.key, body)
        if job.stream:
            return EventStream(events(job, source, form))
        try:
            answer: BaseModel = await while_connected(request.receive, collect(job, source, form))
        except ClientGoneError:
            return Response(status_code=_CLIENT_GONE)
        return Response(answer.model_dump_json(), media_type="application/json")


def _generation(desk: _Desk) -> APIRouter:
    router = APIRouter(responses=answers(400, 401, 404, 408, 413, 500, 503))
    busy = answers(429, 504)

    @router.post("/v1/completions", response_model=Completion, responses=_STREAM | busy)
    async def create_completion(body: CompletionRequest, request: Request, timeout: Timeout = None) -> Response:
        """Continue a prompt; with ``stream`` as server-sent events."""
        desk.check(body, unsupported.COMPLETION)
        job = await completion_job(body, desk.model)
        return await desk.answer(job, CompletionFormat(job), body, timeout, request)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM | busy)
    async def create_chat_completion(body: ChatRequest, request: Request, timeout: Timeout = None) -> Response:
        """Answer a conversation; with ``stream`` as server-sent events."""
        desk.check(body, unsupported.CHAT)
        job = await chat_job(body, desk.model)
        return await desk.answer(job, ChatFormat(job), body, timeout, request)

    tokenization_routes(desk.model, router)
    return router


def _models(model: ServedModel) -> APIRouter:
    router = APIRouter(responses=answers(401, 500, 503))
    card = ModelCard(id=model.name, created=model.created, max_model_len=model.context_length)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The served models."""
        return ModelList(data=[card])

    @router.get("/v1/models/{name:path}", responses=answers(404))
    async def retrieve_model(name: str) -> ModelCard:
        """One served model."""
        model.check_name(name)
        return card

    return router


def _state(pool: GatewayPool, status: Status, metrics: Metrics, drain: Drain) -> APIRouter:
    router = APIRouter(responses=answers(500))

    @router.get("/health", responses=answers(503))
    async def health() -> Health:
        """Whether requests are taken: a gateway answers, and the server is not shutting down."""
        with drain.request():
            try:
                await pool.client(patience_s=0)
            except GatewayLostError as error:
                raise errors.unavailable(str(error)) from error
        return Health(status="ok")

    @router.get("/version")
    async def get_version() -> Version:
        """Evermoe's version."""
        return Version(version=version("evermoe"))

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def get_metrics() -> Response:
        """Figures for Prometheus; without a gateway only those of this process."""
        try:
            report = await status()
        except GatewayLostError:
            report = {"gateways": [], "units": []}
        return Response(metrics.exposition(report), media_type=CONTENT_TYPE)

    @router.get("/evermoe/status", responses=answers(503))
    async def evermoe_status() -> dict[str, Any]:
        """Gateways, expert units and their replicas."""
        try:
            return await status()
        except GatewayLostError as error:
            raise errors.unavailable(str(error)) from error

    return router
