"""A real ASGI server on loopback that answers with known delays: the truth that the load generator is held against."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn


@dataclass
class PacedApp:
    """First token after `ttft_s`, then one every `itl_s`. It keeps its own independent count of what it sent."""

    ttft_s: float = 0.05
    itl_s: float = 0.01
    report_usage: bool = True
    refuse_every: int = 0
    fail_every: int = 0
    tokens_per_event: int = 1
    requests: list[dict[str, Any]] = field(default_factory=list)
    sent_ns: dict[str, list[int]] = field(default_factory=dict)
    """{prompt as text: when the server handed over each event of text}, on the machine's monotonic clock"""
    tokens_sent: int = 0
    answers_ended: int = 0
    answers_dropped: int = 0
    """Streams whose client went away before their end."""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/v1/models":
            await self._answer(send, 200, {"data": [{"id": "paced"}]})
            return
        request = json.loads(body)
        self.requests.append(request)
        number = len(self.requests)
        if self.refuse_every and number % self.refuse_every == 0:
            await self._answer(send, 429, {"error": {"message": "the queue is full", "type": "queue_full"}})
        elif self.fail_every and number % self.fail_every == 0:
            await self._answer(send, 500, {"error": {"message": "broken on purpose"}})
        elif request.get("stream"):
            streaming = asyncio.ensure_future(
                self._stream(send, request, chat=scope["path"].endswith("/chat/completions"))
            )
            leaving = asyncio.ensure_future(receive())
            await asyncio.wait((streaming, leaving), return_when=asyncio.FIRST_COMPLETED)
            self.answers_dropped += not streaming.done()
            streaming.cancel()
            leaving.cancel()
            await asyncio.gather(streaming, leaving, return_exceptions=True)
        else:
            await self._answer(send, 200, _whole(request, chat=scope["path"].endswith("/chat/completions")))

    async def _stream(self, send: Any, request: dict[str, Any], *, chat: bool) -> None:
        start = time.monotonic()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        count = request["max_tokens"]
        if chat:
            await _event(send, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for token in range(0, count, self.tokens_per_event):
            # Against an absolute schedule: delays do not add up.
            due = start + self.ttft_s + token * self.itl_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            batch = min(self.tokens_per_event, count - token)
            text = " é" * batch
            finish = "length" if token + batch >= count else None
            choice = {"delta": {"content": text}} if chat else {"text": text}
            self.sent_ns.setdefault(prompt_key(request), []).append(time.monotonic_ns())
            await _event(send, {"choices": [{"index": 0, **choice, "finish_reason": finish}]})
            self.tokens_sent += batch
        if self.report_usage and request.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": _prompt_length(request), "completion_tokens": count}
            await _event(send, {"choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        self.answers_ended += 1

    async def _answer(self, send: Any, status: int, body: dict[str, Any]) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


async def _event(send: Any, data: dict[str, Any]) -> None:
    line = f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
    await send({"type": "http.response.body", "body": line, "more_body": True})


def _whole(request: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    text = " é" * request.get("max_tokens", 3)
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {"prompt_tokens": _prompt_length(request), "completion_tokens": request.get("max_tokens", 3)}
    return {"id": "x", "choices": [{"index": 0, **choice, "finish_reason": "length"}], "usage": usage}


def prompt_key(request: dict[str, Any]) -> str:
    """What tells a request from others: its prompt."""
    return str(request.get("prompt") or request["messages"][-1]["content"])


def _prompt_length(request: dict[str, Any]) -> int:
    prompt = request.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in request["messages"])
    return len(text.split())


@contextmanager
def serving(app: PacedApp) -> Iterator[str]:
    """Serve on a free loopback port from a thread; yields the base URL and ends the server afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline, "the test server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()
