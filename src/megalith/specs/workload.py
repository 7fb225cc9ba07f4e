"""WorkloadSpec: where requests come from, as data; and the stream of requests that it describes.

Requests are a pure function of (spec, seed): recorded, resampled from a recording, or drawn from distributions. Knows
nothing of who serves them. The true length of an answer is in each shape, for whoever plays the model; what a
scheduler may be told of it is `replay.told_max_new_tokens`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.base.units import NS_PER_S
from megalith.specs import draws
from megalith.specs.arrivals import Arrivals, ClosedLoop, CountedArrivals
from megalith.specs.conversations import Conversations, Sessions
from megalith.specs.draws import Ints
from megalith.specs.expert_mix import ExpertMix, with_experts
from megalith.specs.lengths import Lengths, draw_lengths
from megalith.specs.replay import PRIORITY, due_times, most_output, replayed, windowed
from megalith.specs.shape import PREFIX_BLOCK_TOKENS, RequestShape
from megalith.specs.trace import TraceColumns, TraceFormat

_INPUT, _OUTPUT = 1, 2
"""Numbers of the random streams under a seed; due times and priorities use 3 and 6 (replay.py), the load generator's
texts 4 and 5, conversations 7 to 9, experts 15."""
_CHUNK = 2048
_MAX_MISSES = 1_000_000
_LONGER = "Raise duration_s or the rate."

Pairs: TypeAlias = Callable[[int, int], tuple[Ints, Ints]]


class TraceSource(Config, kw_only=True):
    """A recorded trace, and what is taken from it."""

    path: str
    columns: TraceColumns | None = None
    """None: recognised by name."""
    format: TraceFormat | None = None
    """None: by the name of the file."""
    resample: Literal["none", "joint", "independent"] = "none"
    """none: requests as recorded, in order. joint: (prompt, answer) pairs drawn with replacement (DistServe).
    independent: prompts and answers drawn each on their own (Splitwise). Drawn ones have no prefixes in common."""
    start_s: float = 0.0
    """Leave out what comes earlier than this after the first request; the window's start becomes time zero."""
    end_s: float | None = None
    """Leave out what comes at this time or later."""


class WorkloadSpec(Config, kw_only=True):
    """Where requests come from: a `trace`, or `input` and `output` lengths."""

    name: str = ""
    source: str = ""
    """Where the figures come from."""
    trace: TraceSource | None = None
    input: Lengths | None = None
    output: Lengths | None = None
    conversations: Conversations | None = None
    """Drawn requests that go on where earlier ones ended; None: no two have a beginning in common."""
    experts: ExpertMix | None = None
    """Which of many models each request asks for; None: there is one."""
    arrivals: Arrivals | None = None
    """None: as recorded."""
    speedup: float = 1.0
    """All times divided by this."""
    requests: int | None = None
    """Stop after so many; None: when the trace ends, and never for drawn ones."""
    duration_s: float | None = None
    """Stop before the first arrival at or after this time, counted after `speedup`."""
    max_total_tokens: int | None = None
    """Leave out requests with more than this in prompt and answer together."""
    max_input_tokens: int | None = None
    """Cut longer prompts to this."""
    max_output_tokens: int | None = None
    """Cut longer answers to this."""
    priority_share: float = 0.0
    """Share of the requests that get priority 1 instead of what the trace says."""
    max_new: int | Literal["context", "true"] = "context"
    """What a scheduler is told as the most tokens of an answer: all that the context leaves; a number, at which answers
    are cut as well; or the true length, which no scheduler can know (see `oracle`)."""
    prefix_block_tokens: int = PREFIX_BLOCK_TOKENS
    """Prompt tokens that one prefix id of the trace stands for."""

    def __post_init__(self) -> None:
        _check_source(self)
        _check_numbers(self)

    @property
    def nature(self) -> Literal["recorded", "resampled", "synthetic"]:
        """What the requests are; `recorded` only when lengths and times both are."""
        if self.trace is None:
            return "synthetic"
        return "recorded" if self.trace.resample == "none" and self.arrivals is None else "resampled"

    @property
    def oracle(self) -> bool:
        """The scheduler is told what nobody can know. Results must say so."""
        return self.max_new == "true"

    @property
    def endless(self) -> bool:
        """Nothing bounds the number of requests."""
        bounded_by_trace = self.trace is not None and (self.trace.resample == "none" or self.arrivals is None)
        timed = self.duration_s is not None and not isinstance(self.arrivals, ClosedLoop)
        counted = isinstance(self.arrivals, CountedArrivals)
        return self.requests is None and not (timed or counted or bounded_by_trace)


def _check_source(spec: WorkloadSpec) -> None:
    drawn = spec.input is not None and spec.output is not None
    if (spec.trace is None) != drawn or (spec.trace is not None and (spec.input or spec.output)):
        raise ConfigError("A workload needs a trace, or both input and output lengths.", "Give one of the two.")
    if drawn and spec.arrivals is None:
        raise ConfigError(
            "Drawn lengths have no arrival times.", "Give arrivals, such as poisson at 5 requests a second."
        )
    if spec.conversations and (not drawn or isinstance(spec.arrivals, ClosedLoop)):
        what = "Conversations are made of drawn lengths at drawn times."
        raise ConfigError(what, "Leave them out for a trace or a closed loop; a trace has its own prefix ids.")
    columns = spec.trace.columns if spec.trace else None
    if columns is not None and columns.arrival is None and spec.arrivals is None:
        raise ConfigError("The trace has no arrival column.", "Give arrivals, such as poisson at 5 requests a second.")


def _check_numbers(spec: WorkloadSpec) -> None:
    positive = {
        "speedup": spec.speedup, "requests": spec.requests, "duration_s": spec.duration_s,
        "max_total_tokens": spec.max_total_tokens, "max_input_tokens": spec.max_input_tokens,
        "max_output_tokens": spec.max_output_tokens, "prefix_block_tokens": spec.prefix_block_tokens,
        "max_new": spec.max_new if isinstance(spec.max_new, int) else None,
    }  # fmt: skip
    for name, value in positive.items():
        if value is not None and not 0 < value < 1e18:
            raise ConfigError(f"{name} is {value:g}.", "Give a number above 0.")
    if not 0 <= spec.priority_share <= 1:
        raise ConfigError(f"priority_share is {spec.priority_share:g}.", "Give a share from 0 to 1, such as 0.1.")
    if spec.trace is not None:
        start_s, end_s = spec.trace.start_s, spec.trace.end_s
        if not 0 <= start_s < (1e9 if end_s is None else end_s):
            raise ConfigError(f"The window from {start_s:g} s to {end_s} s is empty.", "Give a start below the end.")


def open_workload(spec: WorkloadSpec, seed: int = 0) -> Iterator[RequestShape]:
    """The requests, in the order of arrival; `at_ns` is None in a closed loop. The same for (spec, seed) everywhere.

    Streams: memory does not grow with the number of requests, except that resampling holds the lengths of its trace.
    Raises ConfigError, naming the line, where a trace cannot be read, and when nothing is left of it.
    """
    shapes = _shapes(spec, seed)
    return shapes if spec.experts is None else with_experts(shapes, spec.experts, seed)


def _shapes(spec: WorkloadSpec, seed: int) -> Iterator[RequestShape]:
    if spec.trace is None:
        assert spec.input is not None
        assert spec.output is not None
        return _drawn(spec, seed, _length_pairs(spec.input, spec.output, seed))
    if spec.trace.resample == "none":
        return replayed(spec, spec.trace, seed)
    return _drawn(spec, seed, _trace_pairs(spec.trace, seed))


def read_trace(path: Path, speedup: float = 1.0) -> Iterator[RequestShape]:
    """Requests of a recorded trace of a known format, due as recorded (the first at zero), `speedup` times faster."""
    return open_workload(WorkloadSpec(trace=TraceSource(path=str(path)), speedup=speedup))


def _drawn(spec: WorkloadSpec, seed: int, pairs: Pairs) -> Iterator[RequestShape]:
    """Requests made of drawn lengths, some thousands at a time."""
    times = _Clock(spec, seed)
    sessions = spec.conversations and Sessions(spec.conversations, spec.prefix_block_tokens, seed)
    index, first = 0, 0
    while spec.requests is None or index < spec.requests:
        count = _CHUNK if spec.requests is None else min(_CHUNK, spec.requests - index)
        inputs, outputs = pairs(first, count)
        first += count
        if spec.max_total_tokens is not None:
            kept = inputs + outputs <= spec.max_total_tokens
            inputs, outputs = inputs[kept], outputs[kept]
            if not index and not len(inputs) and first > _MAX_MISSES:
                what = f"None of {first:,} drawn requests has at most {spec.max_total_tokens} tokens in all."
                raise ConfigError(what, "Raise max_total_tokens, or draw shorter lengths.")
        prompts = np.minimum(inputs, spec.max_input_tokens or 10**18).tolist()
        answers = np.minimum(outputs, most_output(spec)).tolist()
        at_ns, priorities = times.next(len(prompts)), _priorities(spec, seed, index, len(prompts))
        ids = sessions.prefix_ids(index, at_ns, prompts, answers) if sessions else repeat(())
        # Where the times end, so does the workload.
        yield from map(RequestShape, range(index, index + len(prompts)), at_ns, prompts, answers, ids, priorities)
        if times.ended:
            if not index and not at_ns:
                what = "No request arrives before the workload ends"
                raise ConfigError(f"{what} ({spec.duration_s:g} s)." if spec.duration_s else f"{what}.", _LONGER)
            return
        index += len(prompts)


def _priorities(spec: WorkloadSpec, seed: int, first: int, count: int) -> Iterator[int]:
    if not spec.priority_share:
        return repeat(0)
    urgent = draws.shares(splitmix64(seed, PRIORITY), first, count) < spec.priority_share
    return iter(urgent.astype(np.int64).tolist())


class _Clock:
    """Due times for drawn requests, so many at a time, until the workload's end."""

    def __init__(self, spec: WorkloadSpec, seed: int) -> None:
        times = due_times(spec, seed)
        if times is None:
            assert spec.trace is not None
            times = (row[0] for row in windowed(spec.trace))
        self._times, self._speedup = times, spec.speedup
        self._end_ns = None if spec.duration_s is None else round(spec.duration_s * NS_PER_S)
        self.ended = False

    def next(self, count: int) -> list[int | None]:
        """Up to `count` times; fewer, and `ended`, when there are no more."""
        times = list(islice(self._times, count))
        if self._speedup != 1:
            times = [None if at_ns is None else round(at_ns / self._speedup) for at_ns in times]
        if self._end_ns is not None and times and times[-1] is not None and times[-1] >= self._end_ns:
            end_ns = self._end_ns
            times = [at_ns for at_ns in times if at_ns is not None and at_ns < end_ns]
        self.ended = len(times) < count
        return times


def _length_pairs(inputs: Lengths, outputs: Lengths, seed: int) -> Pairs:
    streams = splitmix64(seed, _INPUT), splitmix64(seed, _OUTPUT)

    def pairs(first: int, count: int) -> tuple[Ints, Ints]:
        return draw_lengths(inputs, streams[0], first, count), draw_lengths(outputs, streams[1], first, count)

    return pairs


def _trace_pairs(source: TraceSource, seed: int) -> Pairs:
    """Lengths drawn with replacement from those of a trace, as pairs or each on their own."""
    found: tuple[array[int], array[int]] = (array("q"), array("q"))
    for _, prompt, answer, _, _ in windowed(source):
        found[0].append(prompt)
        found[1].append(answer)
    rows = len(found[0])
    if not rows:
        raise ConfigError(f"The window of the trace {source.path} has no requests.", "Widen it.")
    prompts, answers = (np.frombuffer(lengths, dtype=np.int64) for lengths in found)
    streams = splitmix64(seed, _INPUT), splitmix64(seed, _OUTPUT)

    def picks(stream: int, first: int, count: int) -> Ints:
        return np.floor(draws.shares(stream, first, count) * rows).astype(np.int64)

    def pairs(first: int, count: int) -> tuple[Ints, Ints]:
        left = picks(streams[0], first, count)
        right = left if source.resample == "joint" else picks(streams[1], first, count)
        return prompts[left], answers[right]

    return pairs
