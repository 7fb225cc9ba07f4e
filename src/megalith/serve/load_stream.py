"""What an OpenAI-compatible response says, read as it arrives: text, times of the pieces, usage, errors.

Two sinks: `StreamSink` for server-sent events and `BodySink` for a plain JSON answer. Both keep monotonic
nanoseconds; neither knows what the figures are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec

_MAX_ERROR_BYTES = 4096
_MAX_EVENT_BYTES = 16 << 20


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts as the server reports them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the server took from its prefix cache, where it says so."""
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details else 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class BodySink:
    """A response that is read whole. At most `limit` bytes are kept."""

    def __init__(self, limit: int = _MAX_EVENT_BYTES) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self._limit = limit

    def on_head(self, status: int, headers: dict[str, str], now_ns: int) -> None:
        """Keep status and headers."""
        del now_ns
        self.status, self.headers = status, headers

    def on_body(self, data: bytes, now_ns: int) -> None:
        """Keep the bytes, up to the limit."""
        del now_ns
        self.body += data[: self._limit - len(self.body)]


class StreamSink:
    """A stream of `data:` events. `on_text` sees each piece of text as it arrives.

    `piece_ns` holds the arrival time of every piece of non-empty text: the first gives the time to first token, the
    gaps between them the inter-token latencies. An event with empty text (the role that opens a chat answer, a token
    that is half a character) is no piece.
    """

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.piece_ns: list[int] = []
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.finished = False
        self.error = ""
        self._on_text = on_text
        self._partial = b""
        self._data: list[bytes] = []
        self._error_body = bytearray()

    def on_head(self, status: int, headers: dict[str, str], now_ns: int) -> None:
        """Keep status and headers."""
        del now_ns
        self.status, self.headers = status, headers

    def on_body(self, data: bytes, now_ns: int) -> None:
        """Split into events; anything but status 200 is kept as an error body."""
        if self.status != 200:
            self._error_body += data[: _MAX_ERROR_BYTES - len(self._error_body)]
            self.error = error_text(bytes(self._error_body))
            return
        lines = (self._partial + data).split(b"\n") if self._partial else data.split(b"\n")
        self._partial = lines.pop()
        if len(self._partial) > _MAX_EVENT_BYTES:
            self.error, self._partial = f"an event longer than {_MAX_EVENT_BYTES} bytes", b""
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif self._data and not line.strip(b"\r"):
                self._event(b"\n".join(self._data), now_ns)
                self._data.clear()

    def _event(self, data: bytes, now_ns: int) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            chunk = _decode_chunk(data)
        except msgspec.DecodeError as error:
            self.error = f"an event that is not the JSON it should be ({error}): {data[:80]!r}"
            return
        if chunk.error is not None:
            self.error = _error_message(chunk.error)
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            text = choice.text
            if text is None and choice.delta is not None:
                text = choice.delta.content or choice.delta.reasoning_content
            if text:
                self.piece_ns.append(now_ns)
                if self._on_text is not None:
                    self._on_text(text)


def error_text(body: bytes) -> str:
    """The message of an error body in OpenAI's shape, else the start of the body."""
    with contextlib.suppress(msgspec.DecodeError):
        decoded = msgspec.json.decode(body)
        if isinstance(decoded, dict):
            return _error_message(decoded.get("error") or decoded.get("detail") or decoded)
    return body[:200].decode("utf-8", "replace").strip()


def _error_message(error: Any) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else msgspec.json.encode(error).decode()[:200]
