"""The FastAPI application of an api process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from gateway.api import errors, unsupported
from gateway.api.answer import Format, collect, events
from gateway.api.disconnect import ClientGoneError, while_connected
from gateway.api.errors import ApiError
from gateway.api.event_stream import EventStream
from gateway.api.formats import ChatFormat, CompletionFormat
from gateway.api.job import Job, chat_job, completion_job
from gateway.api.request_context import RequestContext
from gateway.api.requests import ChatRequest, CompletionRequest, SamplingRequest
from gateway.api.responses import ChatCompletion, Completion, ErrorBody, ModelCard, ModelList
from gateway.api.served_model import ApiConfig, ServedModel
from gateway.link import GatewayLostError, GatewayPool

Status = Callable[[], Awaitable[dict[str, Any]]]
"""Reports the application's state as what JSON can hold."""

_CLIENT_GONE = 499
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    **{status: {"model": ErrorBody} for status in (400, 404, 500, 503)},
}


def create_app(config: ApiConfig, pool: GatewayPool, status: Status) -> FastAPI:
    """The OpenAI-compatible API of the model in ``config.store``, answered by the gateways of `pool`.

    The pool is closed when the application shuts down. Raise StoreError for a store without what the api needs.
    """
    model = ServedModel.load(config)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with pool:
            yield

    app = FastAPI(title="Evermoe", lifespan=lifespan)
    app.add_middleware(RequestContext, answer=config.request_ids)
    errors.install(app)
    app.include_router(_generation(model, pool))
    app.include_router(_models(model))
    app.include_router(_state(pool, status))
    return app


def _generation(model: ServedModel, pool: GatewayPool) -> APIRouter:
    router = APIRouter(responses=_ANSWERS)

    @router.post("/v1/completions", response_model=Completion)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt; with ``stream`` as server-sent events."""
        _check(body, model, unsupported.COMPLETION)
        job = await completion_job(body, model)
        return await _answer(job, pool, CompletionFormat(job), request)

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; with ``stream`` as server-sent events."""
        _check(body, model, unsupported.CHAT)
        job = await chat_job(body, model)
        return await _answer(job, pool, ChatFormat(job), request)

    return router


def _models(model: ServedModel) -> APIRouter:
    router = APIRouter()
    card = ModelCard(id=model.name, created=model.created, max_model_len=model.context_length)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The served models."""
        return ModelList(data=[card])

    @router.get("/v1/models/{name:path}", responses={404: {"model": ErrorBody}})
    async def retrieve_model(name: str) -> ModelCard:
        """One served model."""
        _check_name(name, model)
        return card

    return router


def _state(pool: GatewayPool, status: Status) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses={503: {"model": ErrorBody}})
    async def health() -> dict[str, str]:
        """Whether a gateway answers."""
        try:
            await pool.client(patience_s=0)
        except GatewayLostError as error:
            raise errors.unavailable(str(error)) from error
        return {"status": "ok"}

    @router.get("/evermoe/status", responses={503: {"model": ErrorBody}})
    async def evermoe_status() -> Response:
        """Gateways, expert units and their replicas."""
        try:
            return JSONResponse(await status())
        except GatewayLostError as error:
            raise errors.unavailable(str(error)) from error

    return router


def _check(body: SamplingRequest, model: ServedModel, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    if body.model is not None:
        _check_name(body.model, model)
    unsupported.refuse(body.model_extra, neutral)


def _check_name(name: str, model: ServedModel) -> None:
    if name != model.name:
        message = f"The model `{name}` does not exist; this server has `{model.name}`."
        raise ApiError(404, message, param="model", code="model_not_found")


async def _answer(job: Job, pool: GatewayPool, form: Format, request: Request) -> Response:
    if job.stream:
        return EventStream(events(job, pool, form))
    try:
        answer: BaseModel = await while_connected(request.receive, collect(job, pool, form))
    except ClientGoneError:
        return Response(status_code=_CLIENT_GONE)
    return Response(answer.model_dump_json(), media_type="application/json")
