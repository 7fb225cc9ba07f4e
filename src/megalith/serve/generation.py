"""The two endpoints that generate: read, check, run, answer; and give everything back when the client leaves.

Knows the order of things; leaves shapes, sampling fields, prompts and bytes to their modules.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.types import Receive, Scope, Send

from megalith.base.errors import EngineStopped
from megalith.base.units import NS_PER_S
from megalith.engine.api import Delta
from megalith.serve.answers import Usage
from megalith.serve.body import parse_body, read_body
from megalith.serve.errors import ApiError, ClientGone
from megalith.serve.fanin import FanIn
from megalith.serve.record import RequestRecord
from megalith.serve.sampling import Choice, chat_params, completion_params, split_choices
from megalith.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from megalith.serve.shapes import ChatShaper, CompletionShaper, Head, Shaper, Tally, count_usage
from megalith.serve.state import AppState
from megalith.serve.stream import EventStream, stream_answer

Q = TypeVar("Q", bound=GenerationRequest)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, ready to run."""

    choices: Sequence[Choice]
    shaper: Shaper
    priority: int
    stream: bool
    include_usage: bool
    dropped_per_choice: int = 0
    """Generated tokens of each choice that the answer leaves out (echo with max_tokens 0)."""


class GenerationEndpoint(ABC, Generic[Q]):
    """An ASGI endpoint around `prepare`, which a subclass gives."""

    request_type: type[Q]

    def __init__(self, state: AppState) -> None:
        self.state = state

    @abstractmethod
    async def prepare(self, request: Q, record: RequestRecord) -> Job:
        """Check `request` and turn it into a Job. Raises ApiError or RequestError."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; returns without answering when the client has left."""
        record: RequestRecord = scope["megalith.record"]
        state = self.state
        body = await read_body(scope, receive, state.config)
        request = parse_body(body, self.request_type, state.config)
        state.check_model(request.model)
        stream = EventStream(send, state.config.sse_keep_alive_ns) if request.stream else None
        work = asyncio.create_task(self._work(request, record, send, stream))
        watcher = asyncio.create_task(_wait_for_disconnect(receive))
        timeout_s = state.config.request_timeout_ns / NS_PER_S
        try:
            done, _ = await asyncio.wait({work, watcher}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                return work.result()
        finally:
            await _cancel(work, watcher)
        if watcher in done:
            raise ClientGone
        too_late = ApiError(
            504,
            f"The answer was not complete after {timeout_s:g} s; it was stopped.",
            kind="server_error",
            code="timeout",
            headers=(("x-should-retry", "false"),),
        )
        if stream is None or not stream.started:
            raise too_late
        record.finish = "timeout"
        await stream.fail(too_late)

    async def _work(self, request: Q, record: RequestRecord, send: Send, stream: EventStream | None) -> None:
        job = await self.prepare(request, record)
        state = self.state
        fan = FanIn(state.engine, state.metrics, job.choices, job.priority, record.request_id)
        tallies = [Tally() for _ in job.choices]
        async with contextlib.aclosing(fan.run(record.arrival_ns)) as deltas:
            if stream is None:
                payload = await _collect(deltas, job, tallies, record)
                await state.send_json(send, payload)
                return

            def see(index: int, delta: Delta) -> None:
                _check(delta)
                if delta.finish_reason is not None:
                    tallies[index].last = delta
                    _note(record, job, tallies)

            usage = (lambda: _usage(job, tallies)) if job.include_usage else None
            await stream_answer(stream, deltas, job.shaper, see, usage, record.request_id)


class ChatEndpoint(GenerationEndpoint[ChatRequest]):
    """POST /v1/chat/completions."""

    request_type = ChatRequest

    async def prepare(self, request: ChatRequest, record: RequestRecord) -> Job:
        """Render the conversation and check the parameters."""
        state = self.state
        choice = request.tool_choice
        if choice not in (None, "none", "auto"):
            raise ApiError(
                400, "`tool_choice` can be none or auto; forced calls are not served.", param="tool_choice",
                code="unsupported_parameter",
            )  # fmt: skip
        params = chat_params(request, state.vocab, state.engine.max_context)
        ids = await state.prompts.chat(
            request.messages,
            None if choice == "none" or not request.tools else request.tools,
            request.add_generation_prompt,
            request.chat_template_kwargs,
        )
        choices = split_choices([ids], params, request.n, state.config, "messages")
        top = (request.top_logprobs or 0) if request.logprobs else None
        head = _head(state, request, "chatcmpl-" + record.request_id, top)
        return _job(request, choices, ChatShaper(head, len(choices)))


class CompletionEndpoint(GenerationEndpoint[CompletionRequest]):
    """POST /v1/completions."""

    request_type = CompletionRequest

    async def prepare(self, request: CompletionRequest, record: RequestRecord) -> Job:
        """Tokenize the prompts and check the parameters."""
        state = self.state
        params = completion_params(request, state.vocab, state.engine.max_context)
        prompts = await state.prompts.prompts(request.prompt, request.add_special_tokens)
        choices = split_choices(prompts, params, request.n, state.config, "prompt")
        echo = await state.prompts.echo_texts(request.prompt, prompts) if request.echo else None
        drop = request.echo and request.max_tokens == 0
        head = _head(state, request, "cmpl-" + record.request_id, request.logprobs)
        return _job(request, choices, CompletionShaper(head, choices, echo, drop), int(drop))


def _head(state: AppState, request: GenerationRequest, answer_id: str, top: int | None) -> Head:
    options = request.stream_options
    if options is not None and not request.stream:
        raise ApiError(400, "`stream_options` needs `stream: true`.", param="stream_options", code="invalid_value")
    usage = options is not None and options.include_usage
    return Head(answer_id, request.model or state.served_names[0], state.logprobs, top, usage, request.return_token_ids)


def _job(request: GenerationRequest, choices: Sequence[Choice], shaper: Shaper, dropped: int = 0) -> Job:
    options = request.stream_options
    usage = options is not None and options.include_usage
    return Job(choices, shaper, request.priority, request.stream, usage, dropped)


async def _collect(
    deltas: AsyncGenerator[tuple[int, Delta], None], job: Job, tallies: list[Tally], record: RequestRecord
) -> bytes:
    async for index, delta in deltas:
        _check(delta)
        tally = tallies[index]
        tally.text.append(delta.text)
        tally.token_ids += delta.token_ids
        tally.logprobs += delta.logprobs or ()
        if delta.prompt_logprobs is not None:
            tally.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            tally.last = delta
    _note(record, job, tallies)
    return job.shaper.answer(tallies, _usage(job, tallies))


def _check(delta: Delta) -> None:
    """Raise when the engine says that it could not finish."""
    if delta.finish_reason == "error":
        raise ApiError(
            500, delta.error or "The engine failed on this request.", kind="server_error", code="engine_error"
        )
    if delta.finish_reason == "abort":
        raise EngineStopped(delta.error or "The request was stopped because the server is shutting down.")


def _usage(job: Job, tallies: Sequence[Tally]) -> Usage:
    finals = [tally.last for tally in tallies if tally.last is not None]
    return count_usage(job.choices, finals, job.dropped_per_choice * len(finals))


def _note(record: RequestRecord, job: Job, tallies: Sequence[Tally]) -> None:
    """Tell the access log how it ended, once every choice has."""
    finals = [tally.last for tally in tallies if tally.last is not None]
    if len(finals) == len(tallies):
        record.usage = count_usage(job.choices, finals, job.dropped_per_choice * len(finals))
        record.finish = ",".join(sorted({str(delta.finish_reason) for delta in finals}))


async def _wait_for_disconnect(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
