"""One way to get answers for `chat` and `complete`: from an engine in this process, or from an endpoint.

Both give text as it arrives and the same counts at the end. The engine is imported only when a local model is opened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from megalith.base.errors import ConfigError, EngineError, ModelError
from megalith.base.units import NS_PER_S, format_bytes, format_duration
from megalith.cli.output import route_logging, say, working

if TYPE_CHECKING:
    from megalith.engine.api import EngineConfig
    from megalith.engine.launch import BuiltEngine
    from megalith.engine.params import SamplingParams
    from megalith.plan.fit import Fit
    from megalith.serve.load_stream import StreamSink
    from megalith.specs.plan import Estimate

Message = dict[str, str]
OnText = Callable[[str], None]

_ANSWER_DEADLINE_S = 3600.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One whole answer. Times are integer nanoseconds, measured here."""

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_ns: int
    duration_ns: int

    @property
    def rate(self) -> float:
        """Output tokens a second after the first; over the whole duration for one token."""
        if self.completion_tokens > 1 and self.duration_ns > self.ttft_ns:
            return (self.completion_tokens - 1) / (self.duration_ns - self.ttft_ns) * NS_PER_S
        return self.completion_tokens / max(1, self.duration_ns) * NS_PER_S

    def summary(self, predicted: Estimate | None = None) -> str:
        """One line for a person; `predicted` is the plan's rate, printed beside the measured one."""
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        beside = ""
        if predicted is not None:
            low, high = _rate(predicted.low), _rate(predicted.high)
            beside = f" (predicted {_rate(predicted.value)} [{low}, {high}])"
        return (
            f"{self.prompt_tokens} tokens in{cached}, {self.completion_tokens} out, "
            f"first after {format_duration(self.ttft_ns)}, {_rate(self.rate)} tok/s{beside}"
        )


def _rate(per_s: float) -> str:
    """Whole tokens a second, and more digits of what is slow."""
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.3g}"


def rates(answer: Answer, partner: Partner) -> dict[str, Any]:
    """Measured and predicted rate side by side, for `--json`."""
    found = {"measured_tokens_per_s": answer.rate, "predicted_tokens_per_s": partner.predicted}
    return found | ({"streamed": partner.streamed} if partner.streamed else {})


class Partner(Protocol):
    """Something that answers."""

    name: str
    predicted: Estimate | None
    """Tokens a second that the plan promises one conversation; None where there is no plan."""

    @property
    def streamed(self) -> dict[str, float]:
        """What streaming weights took so far; empty where they stay."""
        ...

    def load(self) -> None:
        """The slow part of getting ready. Not a coroutine, so that Ctrl-C ends it at once."""
        ...

    async def start(self) -> None:
        """Make it ready; after `load`."""
        ...

    async def chat(self, messages: list[Message], params: SamplingParams, on_text: OnText) -> Answer:
        """Answer a conversation. Cancelling it stops the work behind it."""
        ...

    async def complete(self, prompt: str, params: SamplingParams, on_text: OnText) -> Answer:
        """Continue a text."""
        ...

    async def close(self) -> None:
        """Give everything back; never hangs."""
        ...


class LocalPartner:
    """An engine in this process."""

    def __init__(self, config: EngineConfig) -> None:
        self.name = config.model
        self.predicted: Estimate | None = None
        self._config = config
        self._built: BuiltEngine | None = None

    @property
    def streamed(self) -> dict[str, float]:
        """As Partner says."""
        return {} if self._built is None else self._built.streamed_facts()

    def load(self) -> None:
        """Print the plan and load the model."""
        from megalith.engine.launch import build_engine

        route_logging()
        begin_ns = time.monotonic_ns()
        with working(f"loading {self.name}") as update:
            self._built = build_engine(self._config, update, _say_plan)
        self.predicted = self._built.fit.plan.points[0].tokens_per_s
        say(f"loaded in {format_duration(time.monotonic_ns() - begin_ns)} ({self._built.fit.kind})")

    async def start(self) -> None:
        """Start the step loop."""
        await self._open().engine.start()

    async def chat(self, messages: list[Message], params: SamplingParams, on_text: OnText) -> Answer:
        """Render the model's chat template and run it."""
        model = self._open().model
        if model.chat_template is None:
            hint = "Use `megalith complete`, or an instruction-tuned model such as smollm2."
            raise ModelError(f"{self.name} has no chat template, so it cannot hold a conversation.", hint)
        prompt = model.chat_template.render(messages, add_generation_prompt=True)
        # The template writes the begin-of-text token itself, where the model wants one.
        return await self._run(model.tokenizer.encode(prompt, add_bos=False), params, on_text)

    async def complete(self, prompt: str, params: SamplingParams, on_text: OnText) -> Answer:
        """Tokenize the bare text and run it."""
        return await self._run(self._open().model.tokenizer.encode(prompt), params, on_text)

    async def _run(self, prompt_ids: list[int], params: SamplingParams, on_text: OnText) -> Answer:
        begin_ns = time.monotonic_ns()
        first_ns = 0
        pieces: list[str] = []
        # max_tokens is the longest answer that is wanted: near the end of the context a shorter one will do.
        room = self._open().engine.max_context - len(prompt_ids)
        if params.max_tokens is not None and 0 < room < params.max_tokens:
            params = msgspec.structs.replace(params, max_tokens=room)
        # aclosing: a cancelled answer aborts its request now, not when the garbage collector finds the iterator.
        stream: Any = self._open().engine.generate(prompt_ids, params)
        async with aclosing(stream):
            async for delta in stream:
                if delta.text:
                    first_ns = first_ns or time.monotonic_ns()
                    pieces.append(delta.text)
                    on_text(delta.text)
                if delta.finish_reason == "error":
                    raise EngineError(delta.error or "The engine failed this request.")
                if delta.finish_reason is not None:
                    end_ns = time.monotonic_ns()
                    return Answer(
                        text="".join(pieces),
                        finish_reason=delta.finish_reason,
                        prompt_tokens=delta.prompt_tokens,
                        cached_tokens=delta.cached_tokens,
                        completion_tokens=delta.completion_tokens,
                        ttft_ns=(first_ns or end_ns) - begin_ns,
                        duration_ns=end_ns - begin_ns,
                    )
        raise EngineError("The engine ended a request without saying why.")

    def _open(self) -> BuiltEngine:
        if self._built is None:
            raise EngineError("The model is not loaded.")
        return self._built

    async def close(self) -> None:
        """Stop the step loop; say how weights streamed, where they did."""
        if self._built is not None:
            await self._built.engine.stop()
            if streamed := self._built.streamed():
                say(streamed)


class EndpointPartner:
    """A model behind an OpenAI-compatible endpoint. `model` None: the first that it lists."""

    @property
    def streamed(self) -> dict[str, float]:
        """Nobody says."""
        return {}

    def __init__(self, url: str, model: str | None, api_key: str | None = None) -> None:
        from megalith.serve.load_http import HttpClient, parse_endpoint

        self._endpoint = parse_endpoint(url, api_key or os.environ.get("OPENAI_API_KEY", ""))
        self._client = HttpClient(self._endpoint)
        self.name = model or ""
        self.predicted: Estimate | None = None

    def load(self) -> None:
        """Nothing: the model is loaded where it is served."""

    async def start(self) -> None:
        """Ask which model is served, when none was named."""
        from megalith.serve.load_run import served_models

        if not self.name:
            self.name = (await served_models(self._endpoint))[0]

    async def chat(self, messages: list[Message], params: SamplingParams, on_text: OnText) -> Answer:
        """POST /chat/completions."""
        return await self._post("/chat/completions", {"messages": messages}, params, on_text)

    async def complete(self, prompt: str, params: SamplingParams, on_text: OnText) -> Answer:
        """POST /completions."""
        return await self._post("/completions", {"prompt": prompt}, params, on_text)

    async def _post(self, path: str, content: dict[str, Any], params: SamplingParams, on_text: OnText) -> Answer:
        from megalith.serve.load_stream import StreamSink

        pieces: list[str] = []

        def keep(text: str) -> None:
            pieces.append(text)
            on_text(text)

        sink = StreamSink(keep)
        body = msgspec.json.encode({"model": self.name, **content, **_wire(params)})
        begin_ns = time.monotonic_ns()
        try:
            await self._client.exchange(self._endpoint.request("POST", path, body), sink, _ANSWER_DEADLINE_S)
        except TimeoutError:
            raise EngineError(f"{self._endpoint.url} did not finish in {_ANSWER_DEADLINE_S:g} s.") from None
        end_ns = time.monotonic_ns()
        self._check(sink)
        usage = sink.usage
        return Answer(
            text="".join(pieces),
            finish_reason=sink.finish_reason or "stop",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            cached_tokens=usage.cached_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else len(sink.piece_ns),
            ttft_ns=(sink.piece_ns[0] if sink.piece_ns else end_ns) - begin_ns,
            duration_ns=end_ns - begin_ns,
        )

    def _check(self, sink: StreamSink) -> None:
        if sink.status in (401, 403):
            hint = "Set --api-key or OPENAI_API_KEY."
        elif sink.status == 429:
            hint = f"Try again in {sink.headers.get('retry-after', 'a few')} s."
        else:
            hint = ""
        if sink.status != 200 or sink.error:
            raise EngineError(f"{self._endpoint.url} answered {sink.status}: {sink.error}", hint)

    async def close(self) -> None:
        """Drop the connections."""
        self._client.close()


def _say_plan(fit: Fit) -> None:
    """The plan in one line, before a weight is read; `megalith plan serve` has the whole of it."""
    plan = fit.plan
    rate = plan.points[0].tokens_per_s
    say(
        f"{plan.parameters:,} parameters, {format_bytes(plan.need_bytes)} of {format_bytes(plan.limit_bytes)}, "
        f"context {fit.max_context:,}; {rate.value:,.0f} [{rate.low:,.0f}, {rate.high:,.0f}] tok/s (predicted)"
    )


def open_partner(model: str | None, url: str | None, api_key: str | None, engine: dict[str, Any]) -> Partner:
    """A partner at `url`, or in this process with `engine` settings for EngineConfig. Not started yet."""
    if url is not None:
        if engine:
            raise ConfigError(f"--{next(iter(engine))} is for a local model.", "Leave it away with --url.")
        return EndpointPartner(url, model, api_key)
    from megalith.engine.api import EngineConfig

    return LocalPartner(EngineConfig(model=model or "smollm2", max_sequences=1, **engine))


def _wire(params: SamplingParams) -> dict[str, Any]:
    """Sampling in OpenAI's words; only what differs from the endpoint's own defaults is sent."""
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    body["temperature"] = params.temperature
    if params.top_p < 1.0:
        body["top_p"] = params.top_p
    for name in ("max_tokens", "seed"):
        if (value := getattr(params, name)) is not None:
            body[name] = value
    if params.stop:
        body["stop"] = list(params.stop)
    return body
