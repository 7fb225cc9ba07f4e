"""Sends one request's deltas as server-sent events: framing, keep-alive comments, errors in mid-stream.

Knows ASGI's send and the shapers; knows nothing of how deltas come about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.types import Send

from megalith.base.units import NS_PER_S
from megalith.engine.api import Delta
from megalith.serve.answers import Usage
from megalith.serve.errors import ApiError, to_api_error
from megalith.serve.shapes import DONE, Shaper

logger = logging.getLogger("megalith.serve")
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_COMMENT = b": waiting\n\n"


class EventStream:
    """One text/event-stream response. The 200 goes out with the first bytes, so that a refusal can still be a 429."""

    def __init__(self, send: Send, keep_alive_ns: int) -> None:
        self._send = send
        self._keep_alive_s = keep_alive_ns / NS_PER_S
        self._last_s = 0.0
        self.started = False

    async def write(self, data: bytes) -> None:
        """Send `data`, after the headers if they have not gone out."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        self._last_s = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def fail(self, error: ApiError) -> None:
        """End a stream that has begun with an error event."""
        await self.end(b"data: " + error.encode() + b"\n\n" + DONE)

    async def end(self, data: bytes) -> None:
        """Send `data` and end the response."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def first(self, deltas: AsyncGenerator[tuple[int, Delta], None]) -> tuple[int, Delta] | None:
        """The first delta, with a comment for each keep-alive interval that it takes. Raises what the engine raises."""
        task = asyncio.ensure_future(anext(deltas, None))
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=self._keep_alive_s)
                if done:
                    return task.result()
                await self.write(_COMMENT)
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def heartbeat(self) -> None:
        """Comments whenever the stream has been silent for the keep-alive interval; runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._keep_alive_s)
            if loop.time() - self._last_s >= self._keep_alive_s * 0.9:
                await self.write(_COMMENT)


async def stream_answer(
    stream: EventStream,
    deltas: AsyncGenerator[tuple[int, Delta], None],
    shaper: Shaper,
    see: Callable[[int, Delta], None],
    usage: Callable[[], Usage] | None,
    request_id: str,
) -> None:
    """Send everything. `see` is told of each delta (it raises when one is a failure); `usage` is asked at the end.

    Raises before the first byte has gone out; afterwards a failure becomes an error event.
    """
    try:
        item = await stream.first(deltas)
        if item is not None:
            see(*item)
            await stream.write(shaper.first_event() + shaper.delta_events(*item))
        pulse = asyncio.create_task(stream.heartbeat())
        try:
            async for index, delta in deltas:
                see(index, delta)
                events = shaper.delta_events(index, delta)
                if events:
                    await stream.write(events)
        finally:
            pulse.cancel()
            await asyncio.gather(pulse, return_exceptions=True)
        await stream.end((shaper.usage_event(usage()) if usage is not None else b"") + DONE)
    except Exception as error:
        if not stream.started:
            raise
        failure = to_api_error(error, request_id)
        if failure.status == 500:
            logger.error("request %s failed in mid-stream: %s", request_id, error, exc_info=_unexpected(error))
        await stream.fail(failure)


def _unexpected(error: Exception) -> Exception | None:
    """The exception when its traceback is wanted: only for bugs, not for expected failures."""
    return None if isinstance(error, ApiError) or hasattr(error, "hint") else error
