"""What every request passes: its id, the door (drain, host name, key), the error shape, the log line and the counter.

Knows HTTP only; knows nothing of models or tokens.
"""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalith.base.errors import MegalithError
from megalith.serve.errors import ApiError, ClientGone, retry_after, to_api_error
from megalith.serve.record import RequestRecord, choose_request_id
from megalith.serve.state import AppState

logger = logging.getLogger("megalith.serve")
# Open to everybody: whoever watches a server must be able to ask whether it lives.
OPEN_PATHS = frozenset({"/health"})
# Answered while draining: they start no work.
DRAIN_PATHS = frozenset({"/health", "/metrics", "/version"})
CLIENT_GONE_STATUS = 499


class Guard:
    """The one middleware of ours, around the routes and inside CORS."""

    def __init__(self, app: ASGIApp, state: AppState, handlers: frozenset[str]) -> None:
        self._app = app
        self._state = state
        self._handlers = handlers
        self._hosts = frozenset(name.lower() for name in state.config.host_names())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer for whatever goes wrong with it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        record = self._record(scope, headers)
        scope["megalith.record"] = record
        id_header = (b"x-request-id", record.request_id.encode())

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), id_header]}
            await send(message)

        try:
            self._check_door(record, headers)
            await self._app(scope, receive, send_noted)
        except ClientGone:
            record.status = CLIENT_GONE_STATUS
        except Exception as error:
            await self._answer_failure(error, record, send_noted)
        finally:
            self._state.metrics.answered(record.handler, record.method, record.status)
            record.log(self._state.config.access_log)

    def _record(self, scope: Scope, headers: dict[bytes, bytes]) -> RequestRecord:
        raw_path = scope.get("raw_path") or scope["path"].encode("utf-8", "replace")
        path = raw_path[:256].decode("ascii", "replace")
        client = scope.get("client")
        return RequestRecord(
            request_id=choose_request_id(headers.get(b"x-request-id")),
            client=f"{client[0]}:{client[1]}" if client else "-",
            method=scope["method"] if scope["method"].isalpha() and len(scope["method"]) <= 16 else "OTHER",
            path=path if path.isprintable() else ascii(path),
            handler=self._handler(scope["path"]),
        )

    def _handler(self, path: str) -> str:
        if path in self._handlers:
            return path
        return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"

    def _check_door(self, record: RequestRecord, headers: dict[bytes, bytes]) -> None:
        state = self._state
        if self._hosts and _host_name(headers.get(b"host", b"")) not in self._hosts:
            raise ApiError(
                403,
                "This server answers only to the names of this machine. Use http://127.0.0.1, or name the host in "
                "server.allowed_hosts.",
                code="host_not_allowed",
            )
        if state.keys is not None and record.path not in OPEN_PATHS:
            offered = headers.get(b"authorization")
            record.key_name = state.keys.find(None if offered is None else offered.decode("latin-1"))
            if record.key_name is None:
                raise ApiError(
                    401,
                    "The API key is missing." if offered is None else "The API key is not known here.",
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers=(("www-authenticate", "Bearer"),),
                )
        if state.draining and record.path not in DRAIN_PATHS:
            raise ApiError(
                503, "The server is shutting down.", kind="server_error", code="shutting_down",
                headers=(*retry_after(5), ("connection", "close")),
            )  # fmt: skip

    async def _answer_failure(self, error: Exception, record: RequestRecord, send: Send) -> None:
        failure = to_api_error(error, record.request_id)
        if not isinstance(error, ApiError | MegalithError):
            logger.error("request %s failed", record.request_id, exc_info=error)
        elif failure.status >= 500:
            logger.warning("request %s: %s", record.request_id, error)
        if record.status:
            # Part of an answer is out already: only cutting the connection tells the client the truth.
            raise error
        await self._state.send_json(send, failure.encode(), failure.status, failure.headers)


def _host_name(host: bytes) -> str:
    """The name in a Host header, without its port."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text.partition("]")[0] + "]"
    return text.partition(":")[0]


def starlette_failure(status: int, detail: Any) -> ApiError:
    """What the router's own refusals (404, 405) become."""
    if status == 404:
        return ApiError(404, "There is nothing at this path. See /openapi.json for what there is.", code="not_found")
    if status == 405:
        return ApiError(405, "This path does not take that method. See /openapi.json.", code="method_not_allowed")
    return ApiError(status, str(detail))
