"""Putting load on an endpoint: sends what a workload says, when it says so, and records what came back.

Open loop (requests have due times): a request is sent when due whatever the server does, and its latency counts from
the moment it was due, so that a client or server that falls behind cannot hide it. Closed loop (no due times): a
fixed number of requests is in flight, and latency counts from sending.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.serve.load_http import Endpoint, EndpointError, HttpClient
from megalith.serve.load_stream import BodySink, StreamSink, error_text
from megalith.serve.load_workload import PromptMaker
from megalith.specs.shape import RequestShape

Outcome = Literal["ok", "refused", "error", "timeout", "cancelled"]
Api = Literal["completions", "chat"]

# A request that a warm-up sends must not share a prompt with one that counts.
_WARMUP_INDEX = 1 << 40
# A dead endpoint answers at once: without an end, a closed loop would fill the memory with failures.
_FAILURES_TO_GIVE_UP = 200


class LoadConfig(Config, frozen=True):
    """How to ask; what to ask comes from a workload. Times in seconds, as people write them in flags."""

    model: str
    api: Api = "completions"
    concurrency: int = 8
    """Closed loop: requests in flight. Ignored for requests with due times."""
    max_in_flight: int = 1024
    """Open loop: bound on requests in flight; one more waits in the client, and its latency runs."""
    max_requests: int | None = 100
    duration_s: float | None = None
    """No request is sent after this; those in flight may finish."""
    timeout_s: float = 120.0
    warmup: int = 0
    temperature: float = 0.0
    ignore_eos: bool = True
    """Ask for exactly the output length (`ignore_eos`, which vLLM, SGLang and Megalith know)."""
    seed: int = 0


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one request. Times are nanoseconds since the run began; None where it did not get so far."""

    index: int
    outcome: Outcome
    status: int
    error: str = ""
    due_ns: int
    """When it should have been sent; in a closed loop, when it was."""
    sent_ns: int
    first_ns: int | None = None
    """Arrival of the first piece of text."""
    end_ns: int
    itl_ns: list[int] = []
    """Gaps between pieces of text."""
    pieces: int = 0
    input_tokens: int = 0
    """As the server counts them, else as asked."""
    output_tokens: int = 0
    """As the server counts them, else the pieces."""
    cached_tokens: int = 0
    usage_reported: bool = False
    wanted_tokens: int = 0
    finish_reason: str | None = None

    @property
    def ttft_ns(self) -> int | None:
        """Time to first token: from due to the first piece of text."""
        return None if self.first_ns is None else self.first_ns - self.due_ns

    @property
    def e2e_ns(self) -> int:
        """From due to the end of the response."""
        return self.end_ns - self.due_ns

    @property
    def tpot_ns(self) -> int | None:
        """Time per output token after the first; None for answers of one token."""
        if self.first_ns is None or self.output_tokens < 2 or not self.itl_ns:
            return None
        return sum(self.itl_ns) // (self.output_tokens - 1)


class LoadRun:
    """One run. `records` grows while `run` runs, so that an interrupted run still has what it measured."""

    def __init__(self, endpoint: Endpoint, config: LoadConfig, prompts: PromptMaker) -> None:
        if config.api == "chat" and prompts.kind == "ids":
            raise ConfigError("A chat message cannot be token ids.", "Use --prompts text, or --api completions.")
        self.endpoint = endpoint
        self.config = config
        self.prompts = prompts
        self.records: list[RequestRecord] = []
        self.issued = 0
        self.gave_up = ""
        """Why the run ended itself early; empty when it did not."""
        self._failures_in_a_row = 0
        self._stopping = asyncio.Event()
        self._client = HttpClient(endpoint)
        self.start_ns = 0
        """When the run began, on the monotonic clock; the times of the records count from it."""

    def stop(self) -> None:
        """Send nothing more and drop what is in flight; `run` returns soon after. Callable from a signal handler."""
        self._stopping.set()

    async def run(self, shapes: Iterable[RequestShape], on_record: Callable[[RequestRecord], None]) -> None:
        """Warm up, then send `shapes` until they, `max_requests` or `duration_s` run out, and await the answers."""
        try:
            await self._warm_up()
            self.start_ns = time.monotonic_ns()
            issuing = asyncio.ensure_future(self._issue(shapes, on_record))
            stopping = asyncio.ensure_future(self._stopping.wait())
            await asyncio.wait((issuing, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not issuing.done():
                issuing.cancel()
            await asyncio.gather(issuing, stopping, return_exceptions=True)
            if not issuing.cancelled() and (failure := issuing.exception()) is not None:
                while isinstance(failure, BaseExceptionGroup) and len(failure.exceptions) == 1:
                    failure = failure.exceptions[0]  # one bad trace row is one failure, not a group of tasks
                raise failure
        finally:
            self._client.close()

    async def _warm_up(self) -> None:
        """The first requests pay for lazy set-up of the server; they are sent two at a time and not counted."""
        for first in range(0, self.config.warmup, 2):
            indices = range(first, min(first + 2, self.config.warmup))
            if self._stopping.is_set():
                return
            shapes = [RequestShape(_WARMUP_INDEX + i, None, 16, 8) for i in indices]
            records = await asyncio.gather(*(self._send(s, self._body(s)) for s in shapes))
            bad = next((r for r in records if r.outcome in ("error", "timeout")), None)
            if bad is not None:
                raise EndpointError(
                    f"A warm-up request to {self.endpoint.url} failed (status {bad.status}): {bad.error}.",
                    "Try it by hand with `megalith complete`, or set --model, --api, --prompts or --vocab.",
                )

    async def _issue(self, shapes: Iterable[RequestShape], on_record: Callable[[RequestRecord], None]) -> None:
        config = self.config
        places: dict[bool, asyncio.Semaphore] = {
            False: asyncio.Semaphore(config.concurrency),
            True: asyncio.Semaphore(config.max_in_flight),
        }
        limit_ns = None if config.duration_s is None else round(config.duration_s * NS_PER_S)
        async with asyncio.TaskGroup() as tasks:
            for shape in itertools.islice(shapes, config.max_requests):
                if limit_ns is not None and (shape.at_ns or 0) >= limit_ns:
                    break
                body = self._body(shape)
                if shape.at_ns is not None:
                    await asyncio.sleep(max(0, shape.at_ns - self._now_ns()) / NS_PER_S)
                place = places[shape.at_ns is not None]
                await place.acquire()
                if limit_ns is not None and self._now_ns() >= limit_ns:
                    break
                self.issued += 1
                tasks.create_task(self._tracked(shape, body, place, on_record))

    async def _tracked(
        self, shape: RequestShape, body: bytes, place: asyncio.Semaphore, on_record: Callable[[RequestRecord], None]
    ) -> None:
        try:
            record = await self._send(shape, body)
        finally:
            place.release()
        self.records.append(record)
        on_record(record)
        self._failures_in_a_row = self._failures_in_a_row + 1 if record.outcome == "error" else 0
        if self._failures_in_a_row >= _FAILURES_TO_GIVE_UP and not self._stopping.is_set():
            self.gave_up = f"{self._failures_in_a_row} requests in a row failed; the last: {record.error}"
            self.stop()

    async def _send(self, shape: RequestShape, body: bytes) -> RequestRecord:
        """One request; a failure, a time-out and a cancellation are outcomes, not exceptions."""
        path = "/chat/completions" if self.config.api == "chat" else "/completions"
        sink = StreamSink()
        outcome: Outcome = "ok"
        detail = ""
        sent_ns = self._now_ns()
        try:
            await self._client.exchange(self.endpoint.request("POST", path, body), sink, self.config.timeout_s)
        except TimeoutError:
            outcome, detail = "timeout", f"no end of the response in {self.config.timeout_s:g} s"
        except EndpointError as error:
            outcome, detail = "error", error.what
        except asyncio.CancelledError:
            outcome, detail = "cancelled", "the run was stopped"
        if outcome == "ok":
            outcome, detail = _judge(sink)
        due_ns = sent_ns if shape.at_ns is None else shape.at_ns
        return self._record(shape, sink, (due_ns, sent_ns), (outcome, detail))

    def _record(
        self, shape: RequestShape, sink: StreamSink, times: tuple[int, int], result: tuple[Outcome, str]
    ) -> RequestRecord:
        pieces = sink.piece_ns
        usage = sink.usage
        return RequestRecord(
            index=shape.index,
            outcome=result[0],
            status=sink.status,
            error=result[1],
            due_ns=times[0],
            sent_ns=times[1],
            first_ns=pieces[0] - self.start_ns if pieces else None,
            end_ns=self._now_ns(),
            itl_ns=[later - earlier for earlier, later in itertools.pairwise(pieces)],
            pieces=len(pieces),
            input_tokens=usage.prompt_tokens if usage else shape.input_tokens,
            output_tokens=usage.completion_tokens if usage else len(pieces),
            cached_tokens=usage.cached_tokens if usage else 0,
            usage_reported=usage is not None,
            wanted_tokens=shape.output_tokens,
            finish_reason=sink.finish_reason,
        )

    def _body(self, shape: RequestShape) -> bytes:
        config = self.config
        prompt = self.prompts.prompt(shape)
        body: dict[str, Any] = {"model": config.model, "max_tokens": shape.output_tokens}
        if config.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        body |= {"temperature": config.temperature, "stream": True, "stream_options": {"include_usage": True}}
        if config.temperature > 0:
            body["seed"] = config.seed + shape.index
        if config.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body)

    def _now_ns(self) -> int:
        return time.monotonic_ns() - self.start_ns


def _judge(sink: StreamSink) -> tuple[Outcome, str]:
    """The outcome of a response that has ended."""
    if sink.status == 429:
        return "refused", sink.error
    if sink.status != 200 or sink.error:
        return "error", sink.error or f"status {sink.status}"
    if sink.finish_reason == "error":
        return "error", "the answer ended with finish_reason `error`"
    if not sink.finished and sink.finish_reason is None:
        return "error", "the stream ended without a finish reason"
    return "ok", ""


async def served_models(endpoint: Endpoint, timeout_s: float = 10.0) -> list[str]:
    """The ids that `GET /models` lists, at least one. Raises EndpointError when nothing useful answers."""
    client, sink = HttpClient(endpoint), BodySink()
    try:
        await client.exchange(endpoint.request("GET", "/models"), sink, timeout_s)
    except TimeoutError:
        raise EndpointError(f"{endpoint.url}/models did not answer in {timeout_s:g} s.") from None
    finally:
        client.close()
    if sink.status != 200:
        hint = "Set --api-key or OPENAI_API_KEY." if sink.status in (401, 403) else "Give --model to skip the question."
        raise EndpointError(f"{endpoint.url}/models answered {sink.status}: {error_text(bytes(sink.body))}", hint)
    try:
        listing = msgspec.json.decode(sink.body)
        names = [str(model["id"]) for model in listing["data"]]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise EndpointError(f"{endpoint.url}/models did not answer a list of models.", "Give --model.") from None
    if not names:
        raise EndpointError(f"{endpoint.url} serves no model.", "Give --model, or start a server that has one.")
    return names
