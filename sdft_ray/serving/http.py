"""The HTTP face: OpenAI's routes, who may pass, how long and how large a request may be, and what errors look like."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import pydantic.json_schema
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from sdft_ray.engines.ask import EngineDiedError
from sdft_ray.serving.access import ANONYMOUS, Key, KeyRing
from sdft_ray.serving.metrics import Meters, PrometheusSink, Sink
from sdft_ray.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse
from sdft_ray.serving.service import Call, Service
from sdft_ray.serving.settings import ServeSettings

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/favicon.ico", "/openapi.json"})
"""What anyone may ask; none of it tells what is served."""

_PATHS = frozenset({*OPEN_PATHS, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"})
"""What figures name; all other paths are one."""


def build_app(
    service: Service,
    keys: KeyRing,
    settings: ServeSettings,
    registry: CollectorRegistry | None = None,
    sinks: Sequence[Sink] = (),
) -> FastAPI:
    """The application; every model has answered once by now.

    Figures go to `registry`, which `/metrics` shows, and to `sinks`.
    """
    registry = registry or CollectorRegistry()
    meters = Meters(PrometheusSink(registry), *sinks)
    app = FastAPI(title="sdft_ray", version=version("sdft_ray"), docs_url=None, redoc_url=None)
    _add_routes(app, service, registry)
    _add_errors(app)
    app.add_middleware(_Gate, service=service, keys=keys, settings=settings, meters=meters)
    if settings.access.cors_origins:
        origins = list(settings.access.cors_origins)
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_routes(app: FastAPI, service: Service, registry: CollectorRegistry) -> None:
    text = files("sdft_ray.serving").joinpath("playground.html").read_text(encoding="utf-8")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    @app.get("/healthz", response_class=PlainTextResponse)
    def healthz() -> str:
        """The process answers, and no engine is known to be dead."""
        _check_engines(service)
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    def readyz() -> str:
        """Every model has answered once: before that nobody listens here."""
        _check_engines(service)
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:
        if _key(request).models is not None:  # figures tell of all models
            raise ApiError(403, "this key may ask some models alone", code="not_for_this_key")
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [service.card(model) for model in service.visible(_key(request))]}

    @app.get("/v1/models/{name:path}")
    def model(name: str, request: Request) -> dict[str, Any]:
        return service.card(service.find(name, _key(request)))

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        return await _answered(request, ChatRequest, service.chat)

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await _answered(request, CompletionRequest, service.complete)

    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]


def _check_engines(service: Service) -> None:
    try:
        for model in service.models.values():
            model.engine.check()
    except EngineDiedError as reason:
        raise ApiError(503, str(reason), code="engine_died", retry_after_s=10) from None


async def _answered(request: Request, kind: Any, answer: Callable[[Any, Call], Awaitable[Any]]) -> Response:
    """Parse, answer, and tell what it took."""
    call = request.scope["sdft_call"]
    parsed = parse(kind, request.scope["sdft_body"])
    call.model = parsed.model
    async with _while_listening(request):
        found = await answer(parsed, call)
    if isinstance(found, dict):
        return JSONResponse(found)
    return _EventStream(_guarded(found), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class _EventStream(StreamingResponse):
    """Ends what makes the events when it is over, however it ends, and does not wait for that to be collected."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


@asynccontextmanager
async def _while_listening(request: Request) -> AsyncIterator[None]:
    """Cancel what runs inside when the client leaves."""
    task, left = asyncio.current_task(), False
    assert task is not None, "requests run in tasks"

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
        raise ApiError(499, "the client left", code="client_left") from None
    finally:
        watcher.cancel()


async def _guarded(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream cannot take its status back: what fails under way is told as its last event."""
    try:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                yield event
    except ApiError as reason:
        yield b"data: " + JSONResponse(reason.body).body + b"\n\n"


def _key(request: Request) -> Key:
    return request.scope["sdft_call"].key


class _Gate:
    """Every request passes here: key, body, access log. Plain ASGI, so a stream's events pay nothing."""

    def __init__(self, app: Any, service: Service, keys: KeyRing, settings: ServeSettings, meters: Meters) -> None:
        self._app = app
        self._service = service
        self._meters = meters
        self._keys = keys
        self._limits = settings.limits
        self._local_only = settings.access.local_hosts_only

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, call = 0, Call(ANONYMOUS)
        scope["sdft_call"] = call

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            path = scope["path"]
            if self._local_only and not _is_local(scope):
                raise ApiError(403, "without keys this service answers to localhost alone", code="wrong_host")
            if path not in OPEN_PATHS and scope["method"] != "OPTIONS":
                call.key = self._identify(scope)
            if scope["method"] == "POST":
                scope["sdft_body"] = await self._body(scope, receive)
            await self._app(scope, receive, told)
        except ApiError as reason:
            await _error_response(reason)(scope, receive, told)
        finally:
            status, took_s = status or 500, time.monotonic() - call.began
            if scope["path"] not in ("/healthz", "/readyz", "/metrics"):
                path = scope["path"] if scope["path"] in _PATHS else ""
                model = self._service.models.get(call.model)
                self._meters.finished(path, model.name if model else "", status, took_s, call)
                if model:
                    self._meters.load(model.name, model.admission.running, model.admission.queued)
                log.info(
                    "%s %s %d key=%s model=%s prompt=%d answer=%d waited=%.3fs took=%.3fs",
                    scope["method"], _plain(scope["path"]), status, call.key.id, _plain(call.model),
                    call.num_prompt, call.num_answer, call.waited_s, took_s,
                )  # fmt: skip

    def _identify(self, scope: Any) -> Key:
        given = dict(scope["headers"]).get(b"authorization")
        scheme, _, secret = (given or b"").decode("latin-1").partition(" ")
        key = self._keys.identify(secret.strip() if given is not None and scheme.lower() == "bearer" else None)
        if key is None or (given is not None and scheme.lower() != "bearer"):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer sk-...", code="invalid_api_key")
        return key

    async def _body(self, scope: Any, receive: Any) -> bytes:
        most, chunks, size = self._limits.max_body_bytes, [], 0
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left", code="client_left")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            told = f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            raise ApiError(408, told, code="body_timeout") from None


def _plain(text: str) -> str:
    """What a client wrote, for a log: on one line, and not long."""
    return text[:200].encode("unicode_escape").decode("ascii")


def _is_local(scope: Any) -> bool:
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name in ("localhost", "127.0.0.1", "[::1]")


def _error_response(reason: ApiError) -> JSONResponse:
    headers = {} if reason.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(reason.retry_after_s)))}
    if reason.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(reason.body, reason.status, headers)


def _add_errors(app: FastAPI) -> None:
    async def known(_: Request, reason: Exception) -> Response:
        assert isinstance(reason, ApiError)
        return _error_response(reason)

    async def of_http(_: Request, reason: Exception) -> Response:
        assert isinstance(reason, HTTPException)
        told = {404: "there is nothing here", 405: "this path does not take this method"}
        error = ApiError(reason.status_code, told.get(reason.status_code, str(reason.detail)))
        response = _error_response(error)
        response.headers.update(reason.headers or {})
        return response

    async def of_parameters(_: Request, reason: Exception) -> Response:
        return _error_response(ApiError(400, str(reason), code="invalid_value"))

    async def unknown(_: Request, reason: Exception) -> Response:
        log.error("an error of ours", exc_info=reason)
        return _error_response(ApiError(500, "an error of the service; its log has more", code="internal_error"))

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_parameters)
    app.add_exception_handler(Exception, unknown)


_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_ERRORS = {
    400: "the request cannot be meant", 401: "no valid key", 404: "no such model", 405: "wrong method",
    408: "the body came too slowly", 413: "the body is too large", 429: "too much at once; see Retry-After",
    503: "the engine is being started anew", 504: "not done in time",
}  # fmt: skip


def _body_of(kind: type[pydantic.BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _schema(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema with our bodies, errors and keys in it."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies: list[Any] = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
    _, defined = pydantic.json_schema.models_json_schema(bodies, ref_template="#/components/schemas/{model}")
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    components = schema.setdefault("components", {})
    components["schemas"] = {**defined["$defs"], "Error": error}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            told = {str(status): {"description": text, "content": content} for status, text in _ERRORS.items()}
            operation["responses"] |= told
            if path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
    app.openapi_schema = schema
    return schema
