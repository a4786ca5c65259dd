"""The HTTP application: OpenAI's routes, authentication, limits on size and time of a request, error responses."""

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

from sdft_ray.engines.request import EngineFailedError
from sdft_ray.serving.access import ANONYMOUS, Key, KeyRing
from sdft_ray.serving.metrics import Meters, PrometheusSink, Sink
from sdft_ray.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse
from sdft_ray.serving.service import Call, Service
from sdft_ray.serving.settings import ServeSettings

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/favicon.ico", "/openapi.json"})
"""Paths that need no key; none of them reveals which models are served."""

_PATHS = frozenset({*OPEN_PATHS, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"})
"""Paths that metrics name; all others are counted as one."""


def build_app(
    service: Service,
    keys: KeyRing,
    settings: ServeSettings,
    registry: CollectorRegistry | None = None,
    sinks: Sequence[Sink] = (),
) -> FastAPI:
    """The application. Every model must have generated a token before it is called.

    Metrics go to `registry`, which `/metrics` shows, and to `sinks`.
    """
    registry = registry or CollectorRegistry()
    meters = Meters(PrometheusSink(registry), *sinks)
    app = FastAPI(
        title="sdft_ray",
        description="Compressed language models behind an OpenAI-compatible API.",
        version=version("sdft_ray"),
        docs_url=None,
        redoc_url=None,
        responses={status: {"description": text, "content": _ERROR_CONTENT} for status, text in _ERRORS.items()},
    )
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
        """Liveness: the process responds and no engine has failed."""
        _check_engines(service)
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    def readyz() -> str:
        """Readiness: every model has generated a token. Before that, nothing listens on this port."""
        _check_engines(service)
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:
        """Metrics of this replica in Prometheus' text format, for keys that may use all models."""
        if _key(request).models is not None:  # metrics cover all models
            raise ApiError(403, "this key is limited to certain models", code="not_for_this_key")
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        """The models that the key may use, with their sizes and limits."""
        return {"object": "list", "data": [service.card(model) for model in service.visible(_key(request))]}

    @app.get("/v1/models/{name:path}")
    def model(name: str, request: Request) -> dict[str, Any]:
        """One model."""
        return service.card(service.find(name, _key(request)))

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation; with `stream`, as server-sent events."""
        return await _answered(request, ChatRequest, service.chat)

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text or token ids; with `stream`, as server-sent events."""
        return await _answered(request, CompletionRequest, service.complete)

    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]


def _check_engines(service: Service) -> None:
    try:
        for model in service.models.values():
            model.engine.check()
    except EngineFailedError as reason:
        raise ApiError(503, str(reason), code="engine_died", retry_after_s=10) from None


async def _answered(request: Request, kind: Any, answer: Callable[[Any, Call], Awaitable[Any]]) -> Response:
    """Parse the body and answer it; the request's `Call` records what it cost."""
    call = request.scope["sdft_call"]
    parsed = parse(kind, request.scope["sdft_body"])
    call.model = parsed.model
    async with _while_listening(request):
        result = await answer(parsed, call)
    if isinstance(result, dict):
        return JSONResponse(result)
    return _EventStream(_guarded(result), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class _EventStream(StreamingResponse):
    """Closes the generator of events as soon as the response ends, not when it is garbage-collected."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


@asynccontextmanager
async def _while_listening(request: Request) -> AsyncIterator[None]:
    """Cancel the code inside the context when the client disconnects."""
    task, has_left = asyncio.current_task(), False
    assert task is not None, "requests run in tasks"

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not has_left:
            raise
        task.uncancel()
        raise ApiError(499, "the client disconnected", code="client_left") from None
    finally:
        watcher.cancel()


async def _guarded(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The status of a stream is sent first, so an error that occurs later becomes its last event."""
    try:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                yield event
    except ApiError as reason:
        yield b"data: " + JSONResponse(reason.body).body + b"\n\n"


def _key(request: Request) -> Key:
    return request.scope["sdft_call"].key


class _Gate:
    """Middleware of every request: key, body, access log. Plain ASGI, so it adds no cost per event of a stream."""

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

        async def watched_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            path = scope["path"]
            if self._local_only and not _is_local(scope):
                raise ApiError(403, "a service without keys answers only requests to localhost", code="wrong_host")
            if path not in OPEN_PATHS and scope["method"] != "OPTIONS":
                call.key = self._identify(scope)
            if scope["method"] == "POST":
                scope["sdft_body"] = await self._body(scope, receive)
            await self._app(scope, receive, watched_send)
        except ApiError as reason:
            await _error_response(reason)(scope, receive, watched_send)
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
        header = dict(scope["headers"]).get(b"authorization")
        scheme, _, secret = (header or b"").decode("latin-1").partition(" ")
        key = self._keys.identify(secret.strip() if header is not None and scheme.lower() == "bearer" else None)
        if key is None or (header is not None and scheme.lower() != "bearer"):
            raise ApiError(401, "a valid API key is required: Authorization: Bearer sk-...", code="invalid_api_key")
        return key

    async def _body(self, scope: Any, receive: Any) -> bytes:
        max_bytes, chunks, size = self._limits.max_body_bytes, [], 0
        too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > max_bytes:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client disconnected", code="client_left")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > max_bytes:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            message = f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            raise ApiError(408, message, code="body_timeout") from None


def _plain(text: str) -> str:
    """Text from a client, made safe for a log: one line, at most 200 characters."""
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
        messages = {404: "no such path", 405: "this path does not support this method"}
        error = ApiError(reason.status_code, messages.get(reason.status_code, str(reason.detail)))
        response = _error_response(error)
        response.headers.update(reason.headers or {})
        return response

    async def of_parameters(_: Request, reason: Exception) -> Response:
        return _error_response(ApiError(400, str(reason), code="invalid_value"))

    async def unknown(_: Request, reason: Exception) -> Response:
        log.error("internal error", exc_info=reason)
        return _error_response(
            ApiError(500, "internal error; the log of the service has details", code="internal_error")
        )

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
    400: "invalid request", 401: "missing or invalid API key", 403: "not allowed for this key or host",
    404: "no such model", 405: "method not supported", 408: "the body did not arrive in time",
    413: "the body is too large", 429: "rate limit or queue limit reached; see Retry-After",
    503: "the engine is restarting; see Retry-After", 504: "the answer was not finished in time",
}  # fmt: skip
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def _body_of(kind: type[pydantic.BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _schema(app: FastAPI) -> dict[str, Any]:
    """FastAPI's OpenAPI schema, with the request bodies, the error object and the authentication of this service."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies: list[Any] = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
    _, defined = pydantic.json_schema.models_json_schema(bodies, ref_template="#/components/schemas/{model}")
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    components = schema.setdefault("components", {})
    components["schemas"] = {**defined["$defs"], "Error": error}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
    app.openapi_schema = schema
    return schema
