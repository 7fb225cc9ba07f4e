"""Requests of a recorded trace, as recorded or at drawn times, within a window and limits.

Knows rows of a trace and what a workload wants of them; must not know files or distributions of lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64, uniform
from megalith.base.units import NS_PER_S
from megalith.specs.arrivals import ClosedLoop, arrival_times
from megalith.specs.shape import RequestShape
from megalith.specs.trace_file import read_rows

if TYPE_CHECKING:
    from megalith.specs.workload import TraceSource, WorkloadSpec

ARRIVAL: Final = 3
PRIORITY: Final = 6
"""Numbers of random streams under a seed; see workload.py."""


def windowed(source: TraceSource) -> Iterator[tuple[int, int, int, tuple[int, ...], int]]:
    """(ns since the start of the window, prompt, answer, prefix ids, priority) of the rows inside it."""
    start_ns = round(source.start_s * NS_PER_S)
    end_ns = None if source.end_s is None else round(source.end_s * NS_PER_S)
    zero_ns: int | None = None
    for _, at_ns, prompt, answer, ids, priority in read_rows(Path(source.path), source.columns, source.format):
        if zero_ns is None:
            zero_ns = at_ns
        since_ns = at_ns - zero_ns
        if end_ns is not None and since_ns >= end_ns:
            return
        if since_ns >= start_ns:
            yield since_ns - start_ns, prompt, answer, ids, priority


def replayed(spec: WorkloadSpec, source: TraceSource, seed: int) -> Iterator[RequestShape]:
    """Requests as recorded; only their times may be drawn."""
    times = due_times(spec, seed)
    end_ns = None if spec.duration_s is None else round(spec.duration_s * NS_PER_S)
    most_input, most_answer = spec.max_input_tokens or 10**18, most_output(spec)
    most_total, share, speedup = spec.max_total_tokens or 10**18, spec.priority_share, spec.speedup
    priority_seed = splitmix64(seed, PRIORITY)
    index, seen = 0, 0
    for recorded_ns, prompt, answer, ids, priority in windowed(source):
        seen += 1
        if prompt + answer > most_total:
            continue
        at_ns = recorded_ns if times is None else next(times, -1)
        if at_ns == -1:
            break  # counted arrivals have ended
        if at_ns is not None:
            if speedup != 1:
                at_ns = round(at_ns / speedup)
            if end_ns is not None and at_ns >= end_ns:
                break
        if share and uniform(priority_seed, index) < share:
            priority = 1
        if prompt > most_input:
            prompt = most_input
        if answer > most_answer:
            answer = most_answer
        yield RequestShape(index, at_ns, prompt, answer, ids, priority)
        index += 1
        if index == spec.requests:
            break
    if not index:
        what = f"Nothing is left of the trace {source.path}: {seen} requests in its window, none within the limits."
        raise ConfigError(what, "Widen the window, or raise max_total_tokens or duration_s.")


def due_times(spec: WorkloadSpec, seed: int) -> Iterator[int | None] | None:
    """Drawn due times before `speedup`; None where they are as recorded."""
    if spec.arrivals is None:
        return None
    if isinstance(spec.arrivals, ClosedLoop):
        return repeat(None)
    return iter(arrival_times(spec.arrivals, splitmix64(seed, ARRIVAL)))


def most_output(spec: WorkloadSpec) -> int:
    """A scheduler that is told a number stops the answer there."""
    told = spec.max_new if isinstance(spec.max_new, int) else 10**18
    return min(told, spec.max_output_tokens or 10**18)


def told_max_new_tokens(spec: WorkloadSpec, shape: RequestShape, context_tokens: int) -> int:
    """What a scheduler may be told of the length of an answer, at least 1."""
    left = max(1, context_tokens - shape.input_tokens)
    if spec.max_new == "context":
        return left
    return min(left, shape.output_tokens if spec.max_new == "true" else spec.max_new)
