"""A simulated run as a trace for Perfetto: instances as processes, steps and leaps as slices, requests as spans.

Knows what happens in a cluster and how it is drawn; must not know the file format (report.trace_events).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megalith.cost.timer import PS_PER_NS, Line
from megalith.report.guarded import WholeFile
from megalith.report.trace_events import MOST_EVENTS, TraceWriter
from megalith.sim.record import Ended
from megalith.sim.series import InstanceSample

_CLUSTER = 0
_STEPS = 1


class RunTrace(WholeFile):
    """Draws one run. Use as a context manager, or call `close` or `discard`.

    Process 0 is the cluster: requests, copies of KV, commands and faults. Process i + 1 is instance i.
    """

    def __init__(self, path: Path, settings: Mapping[str, str], most_events: int = MOST_EVENTS) -> None:
        self.writer = TraceWriter(path, {"nature": "simulated", **settings}, most_events)
        self.writer.process(_CLUSTER, "cluster (simulated)")
        self._known: set[int] = set()

    def instance(self, instance: int, label: str) -> None:
        """Name an instance, such as `prefill 3 (h100)`; one that was not named is called by its number."""
        self._known.add(instance)
        self.writer.process(instance + 1, label)
        self.writer.thread(instance + 1, _STEPS, "steps")

    def steps(self, instance: int, begun_ps: int, line: tuple[int, int, int], decodes: int) -> None:
        """Steps of decodes: `line` is (first_ps, slope_ps, steps), the first of them begun at `begun_ps`."""
        first_ps, slope_ps, steps = line
        end_ps = begun_ps + Line(*line).total_ps(steps)
        name = f"decode {decodes}" if steps == 1 else f"decode {decodes} x {steps} steps"
        arguments = {"decodes": decodes, "repeats": steps - 1, "first_us": first_ps / 1e6, "slope_us": slope_ps / 1e6}
        self._slice(instance, name, begun_ps, end_ps, arguments)

    def prompt_step(self, instance: int, begun_ps: int, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        """A step with prompt chunks."""
        name = f"prompt {prompt_tokens}" + (f" + decode {decodes}" if decodes else "")
        arguments = {"prompt_tokens": prompt_tokens, "decodes": decodes, "repeats": 0}
        self._slice(instance, name, begun_ps, begun_ps + duration_ps, arguments)

    def finished(self, live: Ended) -> None:
        """A request ended: its whole life, and in it waiting, prompt and decode as far as it got."""
        request, end_ns = live.request, live.finish_ns
        key = ("request", request.id)
        arrival_ns = request.arrival_ns
        if live.outcome != "finished":
            arguments = {"prompt_tokens": request.prompt_tokens, "generated": live.generated}
            at_ns = arrival_ns if end_ns is None or end_ns < 0 else end_ns
            self.writer.instant(_CLUSTER, f"request {request.id} {live.outcome}", at_ns, arguments)
            return
        marks = [("waiting", live.scheduled_ns), ("prompt", live.first_ns), ("decode", end_ns)]
        whole = {
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": live.generated,
            "priority": request.priority,
            "preemptions": live.preemptions,
            "migrations": live.migrations,
            "cached_tokens": live.cached_tokens,
            "instance": live.instance,
        }
        self.writer.span(_CLUSTER, key, f"request {request.id}", arrival_ns, max(end_ns or 0, arrival_ns), whole)
        begin_ns = arrival_ns
        for name, mark_ns in marks:
            if mark_ns is not None and mark_ns > begin_ns:
                self.writer.span(_CLUSTER, key, name, begin_ns, mark_ns)
                begin_ns = mark_ns

    def moved(self, request_id: int, source: int, target: int, start_ns: int, end_ns: int, kind: str) -> None:
        """KV of a request went from one instance to another; `kind` such as transfer or migration."""
        arguments = {"request": request_id, "source": source, "target": target}
        self.writer.span(_CLUSTER, (kind, request_id), f"{kind} {source} to {target}", start_ns, end_ns, arguments)
        self.writer.arrow(kind, (source + 1, _STEPS, start_ns), (target + 1, _STEPS, end_ns))

    def sample(self, now_ns: int, rows: Sequence[InstanceSample]) -> None:
        """Counters of every instance, and the power of the cluster."""
        for row in rows:
            pid = self._pid(row.instance)
            self.writer.counter(pid, "requests", now_ns, {"running": row.running, "waiting": row.waiting})
            self.writer.counter(pid, "KV used %", now_ns, {"used": 100 * row.used_share})
            self.writer.counter(pid, "power W", now_ns, {"power": row.power_w})
        self.writer.counter(_CLUSTER, "power W", now_ns, {"power": sum(row.power_w for row in rows)})

    def command(self, at_ns: int, text: str, outcome: str, reason: str = "") -> None:
        """A controller's command ended."""
        self.writer.instant(_CLUSTER, text, at_ns, {"outcome": outcome, "reason": reason}, everywhere=True)

    def fault(self, at_ns: int, instance: int, text: str) -> None:
        """Something happened to an instance: it failed, came back, slowed down."""
        self.writer.instant(self._pid(instance), text, at_ns)

    def close(self) -> int:
        """Complete the file; how many events were left out."""
        self.writer.close()
        return self.writer.left_out

    def discard(self) -> None:
        """Give up and leave no file."""
        self.writer.discard()

    def _pid(self, instance: int) -> int:
        if instance not in self._known:
            self.instance(instance, f"instance {instance}")
        return instance + 1

    def _slice(self, instance: int, name: str, begun_ps: int, end_ps: int, arguments: Mapping[str, float]) -> None:
        """Both ends are cut to nanoseconds alike, so that one step's end is the next one's start."""
        pid = self._pid(instance)
        self.writer.slice(pid, _STEPS, name, begun_ps // PS_PER_NS, end_ps // PS_PER_NS, arguments)
