"""build_app: the routes, the small endpoints, and the app's birth and death.

Knows which path leads where; the generating endpoints are in generation.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from megalith import __version__
from megalith.engine.api import AsyncEngine
from megalith.serve.answers import DetokenizedText, Health, ModelCard, ModelList, Tokens, Version
from megalith.serve.body import parse_body, read_body
from megalith.serve.config import ServerConfig
from megalith.serve.errors import ApiError, retry_after
from megalith.serve.generation import ChatEndpoint, CompletionEndpoint
from megalith.serve.guard import Guard, starlette_failure
from megalith.serve.openapi import OPERATIONS, describe
from megalith.serve.schema import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from megalith.serve.state import AppState

if TYPE_CHECKING:
    from megalith.model.open import OpenModel

Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(engine: AsyncEngine, model: OpenModel, config: ServerConfig) -> Starlette:
    """The ASGI app that serves `model` by `engine`.

    It starts the engine when it starts and stops it when it ends; whoever runs it drains before
    (`app.state.megalith.draining`). Raises ConfigError for a key file that cannot be used.
    """
    state = AppState(engine, model, config)
    small = SmallEndpoints(state)
    routes = [
        Route("/v1/chat/completions", ChatEndpoint(state), methods=["POST"]),
        Route("/v1/completions", CompletionEndpoint(state), methods=["POST"]),
        Route("/v1/embeddings", small.embeddings, methods=["POST"]),
        Route("/v1/models", small.models),
        Route("/v1/models/{id:path}", small.model),
        Route("/tokenize", small.tokenize, methods=["POST"]),
        Route("/detokenize", small.detokenize, methods=["POST"]),
        Route("/health", small.health),
        Route("/metrics", small.metrics),
        Route("/version", small.version),
        Route("/openapi.json", small.openapi),
    ]
    middleware = [Middleware(Guard, state=state, handlers=frozenset(op.path for op in OPERATIONS))]
    if config.cors_origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            ),
        )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:  # noqa: ARG001
        state.prompts.warm()
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()
            state.prompts.close()

    app = Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _refused}
    )
    app.router.redirect_slashes = False
    app.state.megalith = state
    return app


async def _refused(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """404 and 405 of the router, in our error shape."""
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    failure = starlette_failure(status, detail)
    headers = dict(getattr(error, "headers", None) or {})
    return Response(failure.encode(), status, headers, "application/json")


class SmallEndpoints:
    """Everything that does not generate."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._description = msgspec.json.encode(describe())

    def _card(self, name: str) -> ModelCard:
        return ModelCard(name, self._state.created, self._state.engine.max_context)

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        """GET /v1/models."""
        return _json(ModelList([self._card(name) for name in self._state.served_names]))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        name = request.path_params["id"]
        self._state.check_model(name)
        return _json(self._card(name))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: the body is checked, then refused."""
        body = parse_body(await self._read(request), EmbeddingRequest, self._state.config)
        self._state.check_model(body.model)
        raise ApiError(
            400,
            f"The model `{self._state.served_names[0]}` generates text and serves no embeddings. Use another model.",
            param="model",
            code="model_not_supported",
        )

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        state = self._state
        body = parse_body(await self._read(request), TokenizeRequest, state.config)
        state.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Send either `prompt` or `messages`.", param="prompt", code="invalid_value")
        if body.messages is not None:
            ids = await state.prompts.chat(body.messages, None, body.add_generation_prompt)
        else:
            ids = await state.prompts.text(body.prompt or "", body.add_special_tokens)
        return _json(Tokens(len(ids), state.engine.max_context, ids))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        state = self._state
        body = parse_body(await self._read(request), DetokenizeRequest, state.config)
        state.check_model(body.model)
        ids = state.prompts.check_ids(body.tokens, "tokens")
        return _json(DetokenizedText(await state.prompts.decode(ids)))

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        """GET /health: the truth."""
        stats = self._state.engine.stats()
        trouble = self._state.trouble(stats)
        if trouble is not None:
            raise ApiError(503, trouble, kind="server_error", code="unhealthy", headers=retry_after(5))
        return _json(Health(stats.running, stats.waiting, stats.swapped, stats.kv_blocks_used, stats.kv_blocks_total))

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        """GET /metrics."""
        return Response(self._state.metrics.render(), media_type="text/plain; version=0.0.4")

    async def version(self, request: Request) -> Response:  # noqa: ARG002
        """GET /version."""
        return _json(Version(__version__))

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002
        """GET /openapi.json."""
        return Response(self._description, media_type="application/json")

    async def _read(self, request: Request) -> bytes:
        return await read_body(request.scope, request.receive, self._state.config)


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
