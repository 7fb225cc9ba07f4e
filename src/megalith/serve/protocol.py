"""uvicorn's HTTP/1.1 protocol with the deadlines it lacks: headers, stalled readers, and a bound on connections.

Knows sockets and clocks; knows nothing of requests' meaning. `Sweeper.sweep` must be called several times a second.
"""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megalith.base.units import NS_PER_S
from megalith.serve.config import ServerConfig
from megalith.serve.errors import ApiError, retry_after

_REASONS = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


class DeadlineProtocol(H11Protocol):
    """One connection. Every state in which a client can keep us waiting has a deadline.

    - headers: `header_timeout_ns` from the first byte we wait for to complete headers (a slow loris gets 408);
    - body: the endpoint's own deadline;
    - idle between requests: uvicorn's keep-alive timer;
    - not reading: `write_timeout_ns` with a full write buffer, or while closing with bytes unsent; then the connection
      is cut, which tells the endpoint, which frees the request's KV.
    """

    limits: ClassVar[ServerConfig]
    _waiting_since_ns: int | None = None
    _stuck_since_ns: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept, or refuse at once when there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.write_buffer_bytes)
        self._waiting_since_ns = time.monotonic_ns()
        if len(self.connections) > self.limits.max_connections:
            text = f"The server has {self.limits.max_connections} connections open, its limit."
            self._refuse(ApiError(503, text, kind="server_error", code="too_many_connections", headers=retry_after(1)))

    def data_received(self, data: bytes) -> None:
        """Feed the parser and note whether we are still waiting for headers, or for a body that nobody will read."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        unread = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is h11.IDLE or unread:
            if self._waiting_since_ns is None:
                self._waiting_since_ns = time.monotonic_ns()
        else:
            self._waiting_since_ns = None

    def on_response_complete(self) -> None:
        """From here on uvicorn's keep-alive timer watches, until the next byte."""
        self._waiting_since_ns = None
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets our error shape; in the middle of an answer it only gets a closed connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
        else:
            self._refuse(ApiError(400, msg, code="invalid_http"))

    def check(self, now_ns: int) -> None:
        """Act on deadlines that have passed."""
        waiting, stuck = self._waiting_since_ns, self._stuck_since_ns
        closing = self.transport.is_closing()
        if not closing and waiting is not None and now_ns - waiting > self.limits.header_timeout_ns:
            seconds = self.limits.header_timeout_ns / NS_PER_S
            self._refuse(ApiError(408, f"No complete request came within {seconds:g} s.", code="request_timeout"))
        if not (self.flow.write_paused or (closing and self.transport.get_write_buffer_size())):
            self._stuck_since_ns = None
        elif stuck is None:
            self._stuck_since_ns = now_ns
        elif now_ns - stuck > self.limits.write_timeout_ns:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        body = error.encode()
        lines = [
            f"HTTP/1.1 {error.status} {_REASONS[error.status]}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            *(f"{name}: {value}" for name, value in error.headers),
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()


def protocol_class(config: ServerConfig) -> type[DeadlineProtocol]:
    """The protocol with the limits of one server."""
    return type("BoundDeadlineProtocol", (DeadlineProtocol,), {"limits": config})
