"""Failures as OpenAI's clients expect them: an HTTP status and {"error": {message, type, param, code}}.

Knows how the error tree maps to statuses; knows nothing of how a response is sent.
"""

from __future__ import annotations

import msgspec

from megalith.base.errors import (
    CapacityError,
    EngineError,
    EngineStopped,
    MegalithError,
    PromptTooLong,
    QueueFull,
    RequestError,
)


class ErrorBody(msgspec.Struct, frozen=True):
    """The inside of an error answer."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """What every failed request is answered with."""

    error: ErrorBody


class ApiError(Exception):
    """A failure that is ready to be sent: status, OpenAI's four fields, and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorAnswer(ErrorBody(message, kind, param, code))
        self.headers = headers

    def encode(self) -> bytes:
        """The JSON body. Characters that are no valid Unicode are replaced, so that it can always be sent."""
        try:
            return msgspec.json.encode(self.body)
        except UnicodeEncodeError:
            error = self.body.error
            safe = error.message.encode("utf-8", "replace").decode()
            return msgspec.json.encode(ErrorAnswer(ErrorBody(safe, error.type, None, error.code)))


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


def retry_after(seconds: int) -> tuple[tuple[str, str], ...]:
    """The header that tells a client when to come back."""
    return (("retry-after", str(max(1, seconds))),)


def to_api_error(error: Exception, request_id: str) -> ApiError:
    """Any exception as an ApiError. What is not an expected failure becomes a 500 that names the request, no more."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code="invalid_value")
    if isinstance(error, QueueFull):
        return ApiError(
            429, str(error), kind="rate_limit_error", code="queue_full", headers=retry_after(error.retry_after_s)
        )
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), kind="server_error", code="shutting_down", headers=retry_after(5))
    if isinstance(error, CapacityError):
        return ApiError(503, str(error), kind="server_error", code="over_capacity", headers=retry_after(1))
    if isinstance(error, EngineError):
        return ApiError(500, str(error), kind="server_error", code="engine_error")
    if isinstance(error, MegalithError):
        return ApiError(500, str(error), kind="server_error", code="internal_error")
    return ApiError(
        500,
        f"The server failed on this request (id {request_id}). Its log has the details.",
        kind="server_error",
        code="internal_error",
    )
