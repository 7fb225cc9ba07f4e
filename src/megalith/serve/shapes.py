"""Deltas of the engine as OpenAI's answers and stream events: one shaper for chat, one for completions.

Knows the two shapes; knows nothing of sockets. The common stream event (text only) is assembled from bytes made once
for the request; the rare ones go through msgspec. Tests hold the two equal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from megalith.engine.api import Delta, TokenLogprob
from megalith.serve.answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishText,
    PromptTokensDetails,
    Usage,
)
from megalith.serve.logprobs import LogprobWriter
from megalith.serve.sampling import Choice

_ENCODER = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"


def event(answer: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + _ENCODER.encode(answer) + b"\n\n"


@dataclass(slots=True)
class Tally:
    """What one choice has said so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    last: Delta | None = None


class Shaper(Protocol):
    """How one endpoint writes its answers."""

    def first_event(self) -> bytes:
        """What a stream begins with."""
        ...

    def delta_events(self, index: int, delta: Delta) -> bytes:
        """The events for one delta; may be empty."""
        ...

    def usage_event(self, usage: Usage) -> bytes:
        """The last event before DONE when usage was asked for."""
        ...

    def answer(self, tallies: Sequence[Tally], usage: Usage) -> bytes:
        """The whole answer of a request that is not streamed."""
        ...


def finish_text(delta: Delta) -> FinishText | None:
    """OpenAI's finish reason of a delta; `abort` and `error` never get here, they are failures."""
    if delta.finish_reason is None:
        return None
    return "length" if delta.finish_reason == "length" else "stop"


def _stop_reason(delta: Delta) -> str | int | UnsetType:
    return UNSET if delta.stop_reason is None else delta.stop_reason


def count_usage(choices: Sequence[Choice], finals: Sequence[Delta], dropped: int = 0) -> Usage:
    """Usage of a finished request: each prompt counts once, every choice's output counts, less `dropped` tokens."""
    prompt = cached = output = 0
    for choice, delta in zip(choices, finals, strict=True):
        output += delta.completion_tokens
        if choice.index == 0 or choices[choice.index - 1].prompt_index != choice.prompt_index:
            prompt += delta.prompt_tokens
            cached += delta.cached_tokens
    output -= dropped
    return Usage(prompt, output, prompt + output, PromptTokensDetails(cached))


@dataclass(frozen=True, slots=True)
class Head:
    """What all answers to one request share."""

    id: str
    model: str
    writer: LogprobWriter
    top_logprobs: int | None
    include_usage: bool = False
    return_token_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))


class ChatShaper:
    """Shapes of /v1/chat/completions."""

    def __init__(self, head: Head, num_choices: int) -> None:
        self._head = head
        self._num_choices = num_choices
        self._usage: UnsetType | None = None if head.include_usage else UNSET
        empty = self._chunk([ChatChunkChoice(0, ChatDelta(content="?"))])
        self._prefixes, self._suffix = _cut(event(empty), num_choices)
        self._plain = head.top_logprobs is None and not head.return_token_ids

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(self._head.id, self._head.created, self._head.model, choices, usage=self._usage)

    def first_event(self) -> bytes:
        """The role of every choice."""
        return b"".join(
            event(self._chunk([ChatChunkChoice(index, ChatDelta(role="assistant", content=""))]))
            for index in range(self._num_choices)
        )

    def delta_events(self, index: int, delta: Delta) -> bytes:
        """Content, then, at the end, an event with only the finish reason."""
        if self._plain:
            events = b"".join((self._prefixes[index], _ENCODER.encode(delta.text), self._suffix)) if delta.text else b""
        elif delta.text or delta.token_ids:
            choice = ChatChunkChoice(
                index,
                ChatDelta(content=delta.text),
                self._logprobs(delta.logprobs or ()),
                token_ids=list(delta.token_ids) if self._head.return_token_ids else UNSET,
            )
            events = event(self._chunk([choice]))
        else:
            events = b""
        finish = finish_text(delta)
        if finish is not None:
            last = ChatChunkChoice(index, ChatDelta(), finish_reason=finish, stop_reason=_stop_reason(delta))
            events += event(self._chunk([last]))
        return events

    def usage_event(self, usage: Usage) -> bytes:
        """A chunk without choices."""
        return event(ChatChunk(self._head.id, self._head.created, self._head.model, [], usage=usage))

    def answer(self, tallies: Sequence[Tally], usage: Usage) -> bytes:
        """A chat.completion."""
        choices = []
        for index, tally in enumerate(tallies):
            last = _last(tally)
            choices.append(
                ChatChoice(
                    index,
                    AnswerMessage("".join(tally.text)),
                    self._logprobs(tally.logprobs),
                    finish_text(last) or "stop",
                    _stop_reason(last),
                    tally.token_ids if self._head.return_token_ids else UNSET,
                )
            )
        head = self._head
        return _ENCODER.encode(ChatCompletion(head.id, head.created, head.model, choices, usage))

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        top = self._head.top_logprobs
        return None if top is None else self._head.writer.chat(entries, top)


class CompletionShaper:
    """Shapes of /v1/completions. `echo_texts` are the prompts to repeat, one a prompt; None: no echo."""

    def __init__(
        self, head: Head, choices: Sequence[Choice], echo_texts: Sequence[str] | None, drop_output: bool
    ) -> None:
        self._head = head
        self._choices = choices
        self._echo = echo_texts
        self._drop = drop_output
        self._offsets = [0] * len(choices)
        self._echoed = [echo_texts is None] * len(choices)
        self._usage: UnsetType | None = None if head.include_usage else UNSET
        self._prefixes, self._suffix = _cut(event(self._chunk([CompletionChoice(0, "?")])), len(choices))
        self._plain = head.top_logprobs is None and not head.return_token_ids

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(self._head.id, self._head.created, self._head.model, choices, usage=self._usage)

    def first_event(self) -> bytes:
        """Nothing: a completion has no role."""
        return b""

    def delta_events(self, index: int, delta: Delta) -> bytes:
        """The echoed prompt before the first text, then text, then an event with only the finish reason."""
        events = b""
        if not self._echoed[index]:
            self._echoed[index] = True
            events = event(self._chunk([self._echo_choice(index, delta.prompt_logprobs or ())]))
        if not self._drop and (delta.text or (delta.token_ids and not self._plain)):
            if self._plain:
                events += b"".join((self._prefixes[index], _ENCODER.encode(delta.text), self._suffix))
            else:
                events += event(self._chunk([self._text_choice(index, delta)]))
        finish = finish_text(delta)
        if finish is not None:
            if self._drop:
                finish = "length"
            last = CompletionChoice(index, "", None, finish, UNSET if self._drop else _stop_reason(delta))
            events += event(self._chunk([last]))
        return events

    def _echo_choice(self, index: int, entries: Sequence[TokenLogprob | None]) -> CompletionChoice:
        choice = self._choices[index]
        ids = choice.prompt_ids
        text = self._echo[choice.prompt_index] if self._echo is not None else ""
        logprobs = self._logprobs(index, entries, ids) if entries else None
        self._offsets[index] = len(text)
        return CompletionChoice(index, text, logprobs, token_ids=ids if self._head.return_token_ids else UNSET)

    def _text_choice(self, index: int, delta: Delta) -> CompletionChoice:
        entries = delta.logprobs or ()
        logprobs = self._logprobs(index, entries, [entry.token_id for entry in entries])
        ids = list(delta.token_ids) if self._head.return_token_ids else UNSET
        return CompletionChoice(index, delta.text, logprobs, token_ids=ids)

    def usage_event(self, usage: Usage) -> bytes:
        """A chunk without choices."""
        return event(Completion(self._head.id, self._head.created, self._head.model, [], usage=usage))

    def answer(self, tallies: Sequence[Tally], usage: Usage) -> bytes:
        """A text_completion."""
        head = self._head
        choices = [self._whole_choice(index, tally) for index, tally in enumerate(tallies)]
        return _ENCODER.encode(Completion(head.id, head.created, head.model, choices, usage=usage))

    def _whole_choice(self, index: int, tally: Tally) -> CompletionChoice:
        last = _last(tally)
        text, ids = ("", []) if self._drop else ("".join(tally.text), tally.token_ids)
        entries: list[TokenLogprob | None] = [] if self._drop else list(tally.logprobs)
        entry_ids = [entry.token_id for entry in entries if entry is not None]
        if self._echo is not None:
            choice = self._choices[index]
            text = self._echo[choice.prompt_index] + text
            ids = choice.prompt_ids + ids
            entries = [*tally.prompt_logprobs, *entries]
            entry_ids = choice.prompt_ids[: len(tally.prompt_logprobs)] + entry_ids
        logprobs = self._logprobs(index, entries, entry_ids)
        finish = "length" if self._drop else finish_text(last) or "stop"
        reason = UNSET if self._drop else _stop_reason(last)
        return CompletionChoice(index, text, logprobs, finish, reason, ids if self._head.return_token_ids else UNSET)

    def _logprobs(
        self, index: int, entries: Sequence[TokenLogprob | None], ids: Sequence[int]
    ) -> CompletionLogprobs | None:
        top = self._head.top_logprobs
        if top is None:
            return None
        logprobs, self._offsets[index] = self._head.writer.completion(entries, ids, top, self._offsets[index])
        return logprobs


def _cut(sample: bytes, num_choices: int) -> tuple[list[bytes], bytes]:
    """The bytes before the text "?" of a sample event, one for each choice index, and those after it."""
    before, _, suffix = sample.rpartition(b'"?"')
    start, _, rest = before.rpartition(b'"index":0')
    return [start + b'"index":%d' % index + rest for index in range(num_choices)], suffix


def _last(tally: Tally) -> Delta:
    if tally.last is None:
        raise RuntimeError("a choice ended without a last delta")
    return tally.last
