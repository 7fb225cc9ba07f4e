"""A cheap HTTP/1.1 client for the load generator and the terminal: raw asyncio transports, no event-loop hop a chunk.

The load generator shares its cores with the server that it measures, so bytes are parsed where they arrive (inside
`data_received`, stamped with the monotonic clock once a segment) and no task wakes until the response has ended.
Knows HTTP framing and connection reuse; knows nothing of JSON, models or tokens.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from dataclasses import dataclass
from typing import Literal, Protocol, cast
from urllib.parse import urlsplit

from megalith.base.errors import ConfigError, MachineError
from megalith.base.loopback import is_loopback

_MAX_HEAD_BYTES = 65_536
_CONNECT_TIMEOUT_S = 10.0
# uvicorn and most servers drop a connection after 5 idle seconds; reuse only what is younger.
_MAX_IDLE_NS = 3_000_000_000


class EndpointError(MachineError):
    """An endpoint that cannot be reached, or that does not speak HTTP/1.1 as it should."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an OpenAI-compatible API lives. `base_path` starts with `/` and has no `/` at its end (`/v1`)."""

    host: str
    port: int
    base_path: str
    tls: bool = False
    api_key: str = ""

    @property
    def url(self) -> str:
        """The address as a person writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.base_path}"

    def is_loopback(self) -> bool:
        """Whether the host is this machine by its name or address; names are not looked up."""
        return is_loopback(self.host)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole request as bytes; `path` is relative to `base_path`."""
        head = [f"{method} {self.base_path}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Accept: */*"]
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        if body:
            head.append("Content-Type: application/json")
        head.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def parse_endpoint(url: str, api_key: str = "") -> Endpoint:
    """The endpoint of `url` such as `http://127.0.0.1:8000/v1` (an empty path means `/v1`). Raises ConfigError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise ConfigError(f"{url!r} has no usable port.", "Write http://127.0.0.1:8000/v1.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is not an HTTP address.", "Write http://127.0.0.1:8000/v1.")
    if any(character in api_key for character in "\r\n"):
        raise ConfigError("The API key has a line break in it.", "Pass the key alone.")
    return Endpoint(parts.hostname, port, parts.path.rstrip("/") or "/v1", parts.scheme == "https", api_key)


class Sink(Protocol):
    """What a response is poured into, as it arrives. Called from the event loop; must not block."""

    def on_head(self, status: int, headers: dict[str, str], now_ns: int) -> None:
        """Status line and headers (names in lower case) are in."""
        ...

    def on_body(self, data: bytes, now_ns: int) -> None:
        """Some bytes of the body, without any transfer encoding."""
        ...


class ResponseParser:
    """One HTTP/1.1 response, fed in arbitrary pieces. No I/O, so that any split of the bytes can be tested.

    States: `head` until the blank line; then `length` or `chunk-size` -> `chunk-data` -> ... -> `trailer`, or
    `until-close`; then `done`. Bytes after the end are an error: nothing is pipelined.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._buffer = bytearray()
        self._left = 0
        self.state: Literal["head", "length", "chunk-size", "chunk-data", "trailer", "until-close", "done"] = "head"
        self.keep_alive = True
        self.started = False

    def feed(self, data: bytes, now_ns: int) -> None:
        """Take the next bytes. Raises EndpointError on what is not HTTP/1.1."""
        self.started = True
        self._buffer += data
        while self._buffer and self.state != "done":
            if not self._advance(now_ns):
                return
        if self._buffer:
            raise EndpointError(f"The endpoint sent {len(self._buffer)} bytes after the end of its response.")

    def feed_eof(self) -> None:
        """The peer closed. Raises EndpointError when the response is not whole."""
        if self.state == "until-close":
            self.state = "done"
        if self.state != "done":
            raise EndpointError(f"The endpoint closed the connection in the middle of a response ({self.state}).")

    def _advance(self, now_ns: int) -> bool:
        """Parse one element; False when more bytes are needed."""
        match self.state:
            case "head":
                return self._head(now_ns)
            case "length" | "chunk-data":
                return self._counted(now_ns)
            case "until-close":
                self._sink.on_body(self._take(len(self._buffer)), now_ns)
                return True
            case _:
                return self._chunk_line()

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _head(self, now_ns: int) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise EndpointError(f"The response head is longer than {_MAX_HEAD_BYTES} bytes.")
            return False
        status_line, *lines = self._take(end + 4)[:-4].decode("latin-1").split("\r\n")
        version, _, rest = status_line.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdigit():
            raise EndpointError(f"The endpoint does not speak HTTP/1.1: it answered {status_line[:60]!r}.")
        status = int(rest[:3])
        if status < 200:
            return True
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        connection = headers.get("connection", "").lower()
        self.keep_alive = connection != "close" if version == "HTTP/1.1" else connection == "keep-alive"
        self._frame(status, headers)
        self._sink.on_head(status, headers, now_ns)
        return True

    def _frame(self, status: int, headers: dict[str, str]) -> None:
        """Decide how the body ends (RFC 9112, section 6.3)."""
        if status in (204, 304):
            self.state = "done"
        elif "chunked" in headers.get("transfer-encoding", "").lower():
            self.state = "chunk-size"
        elif (length := headers.get("content-length")) is not None:
            if not length.isdigit():
                raise EndpointError(f"The endpoint sent Content-Length {length[:40]!r}.")
            self._left = int(length)
            self.state = "length" if self._left else "done"
        else:
            self.state, self.keep_alive = "until-close", False

    def _counted(self, now_ns: int) -> bool:
        data = self._take(min(self._left, len(self._buffer)))
        self._left -= len(data)
        if self._left == 0:
            self.state = "done" if self.state == "length" else "chunk-size"
        self._sink.on_body(data, now_ns)
        return True

    def _chunk_line(self) -> bool:
        """A chunk's size line (also the empty line that ends the chunk before), or a line of the trailer."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise EndpointError("A chunk of the response has no size line.")
            return False
        line = self._take(end + 2)[:-2]
        if self.state == "trailer":
            self.state = "done" if not line else "trailer"
        elif line:
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise EndpointError(f"{line[:20]!r} is not the size of a chunk.") from None
            self.state = "chunk-data" if self._left else "trailer"
        return True


class _Connection(asyncio.Protocol):
    """One TCP connection, one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.idle_since_ns = 0
        self.parser: ResponseParser | None = None
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def start(self, request: bytes, sink: Sink) -> asyncio.Future[None]:
        """Send a request; the future ends when its response has."""
        if self.transport is None:
            raise EndpointError("The connection is not open.")
        self.parser = ResponseParser(sink)
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        if self.parser is None or self.done is None or self.done.done():
            self.abort()
            return
        try:
            self.parser.feed(data, now_ns)
        except Exception as error:
            self.done.set_exception(error)
            self.abort()
            return
        if self.parser.state == "done":
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.done is None or self.done.done() or self.parser is None:
            return
        try:
            self.parser.feed_eof()
        except EndpointError as error:
            reason = EndpointError(f"{error.what} ({exc})") if exc else error
            self.done.set_exception(reason)
        else:
            self.done.set_result(None)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
            self.transport = None


class HttpClient:
    """Connections to one endpoint, reused last-in first-out. Use it within one event loop and close it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if endpoint.tls else None

    async def exchange(self, request: bytes, sink: Sink, timeout_s: float) -> None:
        """Send `request` and pour the response into `sink`; returns when it has ended.

        Raises TimeoutError after `timeout_s`, EndpointError when the peer cannot be reached or breaks off. Cancelling
        it drops the connection. A kept connection that the peer had closed meanwhile is replaced once, unseen.
        """
        async with asyncio.timeout(timeout_s):
            reused = self._reusable()
            if reused is not None and await self._attempt(reused, request, sink, retry=True):
                return
            await self._attempt(await self._connect(), request, sink, retry=False)

    async def _attempt(self, connection: _Connection, request: bytes, sink: Sink, *, retry: bool) -> bool:
        """One exchange on one connection; False only with `retry`, when it broke before any byte of a response."""
        try:
            await connection.start(request, sink)
        except EndpointError:
            connection.abort()
            if retry and (connection.parser is None or not connection.parser.started):
                return False
            raise
        except BaseException:
            connection.abort()
            raise
        if connection.transport is not None and connection.parser is not None and connection.parser.keep_alive:
            connection.idle_since_ns = time.monotonic_ns()
            self._idle.append(connection)
        else:
            connection.abort()
        return True

    def _reusable(self) -> _Connection | None:
        oldest_ns = time.monotonic_ns() - _MAX_IDLE_NS
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and connection.idle_since_ns >= oldest_ns:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        where = self.endpoint
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(_Connection, where.host, where.port, ssl=self._tls)
        except TimeoutError:
            raise EndpointError(f"{where.url} did not accept a connection in {_CONNECT_TIMEOUT_S:g} s.") from None
        except OSError as error:
            # asyncio's own text repeats the address; a failed look-up has a negative number and a text of its own.
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
            hint = "Start one with `megalith serve smollm2`, or name another with --url."
            raise EndpointError(f"Nothing answers at {where.url} ({reason.lower()}).", hint) from None
        return connection

    def close(self) -> None:
        """Drop the idle connections."""
        while self._idle:
            self._idle.pop().abort()
