"""The recorder: takes what happens in a simulated cluster at about a microsecond a call and keeps what a report needs.

Knows the ends of requests and the durations of steps; must not know policies, timers or how an instance works. Calls
go into flat lists; every few thousand they become columns of integers, and those go into histograms, a timeline, the
service level and, when asked for, a sink (report.parquet). Memory does not grow with the number of finished requests:
up to `EXACT_LIMIT` of them percentiles are exact, beyond that within `RELATIVE_ERROR`, and the result says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Protocol, TypeAlias

import numpy as np
from mypy_extensions import mypyc_attr
from numpy.typing import NDArray

from megalith.policy.facts import Request
from megalith.sim.attainment import Attainment, Latencies, Reference
from megalith.sim.histogram import Histogram, IntArray
from megalith.sim.record_figures import (
    ARRIVED,
    COUNTERS,
    DECODING,
    FINISHED,
    FIRSTS,
    GOOD,
    LEVELS,
    OUTPUT,
    PRESENT,
    PROMPTS,
    WAITING,
    RecordFigures,
    Totals,
    describe_record,
)
from megalith.sim.samples import EXACT_LIMIT, Samples
from megalith.sim.series import InstanceSample, Series
from megalith.sim.timeline import Timeline
from megalith.specs.slo import Slo

Columns: TypeAlias = Mapping[str, IntArray]
Sink: TypeAlias = Callable[[Columns], object]

OUTCOMES = ("finished", "rejected", "failed")
_CODES = {name: code for code, name in enumerate(OUTCOMES)}

COLUMNS = (
    "id", "arrival_ns", "prompt_tokens", "priority", "output_tokens", "scheduled_ns", "first_ns", "finish_ns",
    "generated", "preemptions", "migrations", "cached_tokens", "transfer_ns", "instance", "decode_instance", "outcome",
)  # fmt: skip
"""What a sink gets of each request, integers; -1: never happened. `outcome` is an index into OUTCOMES."""

LATENCIES = ("ttft_ns", "tpot_ns", "e2e_ns", "queue_ns", "transfer_ns", "normalized_ns")
_CLASS_LATENCIES = LATENCIES[:3]
_REQUEST = ("id", "arrival_ns", "prompt_tokens", "priority")
_READERS = {name: attrgetter(name) for name in COLUMNS[:-1]}
_ONLY_FOR_SINKS = frozenset({"id", "output_tokens", "instance", "decode_instance"})
# A request that ended holds its prefix hashes, so not many may wait.
_ENDS = 1024
_STEP_FIELDS = 5
_STEP_WORDS = 4096 * _STEP_FIELDS
_MOST_CLASSES = 16


class Ended(Protocol):
    """What the recorder reads of a request (`sim.live.Live`). A time or instance that never was: -1 or None."""

    @property
    def request(self) -> Request: ...  # noqa: D102
    @property
    def output_tokens(self) -> int: ...  # noqa: D102
    @property
    def scheduled_ns(self) -> int | None: ...  # noqa: D102
    @property
    def first_ns(self) -> int | None: ...  # noqa: D102
    @property
    def finish_ns(self) -> int | None: ...  # noqa: D102
    @property
    def generated(self) -> int: ...  # noqa: D102
    @property
    def preemptions(self) -> int: ...  # noqa: D102
    @property
    def migrations(self) -> int: ...  # noqa: D102
    @property
    def cached_tokens(self) -> int: ...  # noqa: D102
    @property
    def transfer_ns(self) -> int: ...  # noqa: D102
    @property
    def instance(self) -> int | None: ...  # noqa: D102
    @property
    def decode_instance(self) -> int | None: ...  # noqa: D102
    @property
    def outcome(self) -> str: ...  # noqa: D102


@mypyc_attr(allow_interpreted_subclasses=True)
class Recorder:
    """Collects one run. Call `figures()` at the end; until then everything but the public methods may lag a batch."""

    def __init__(
        self,
        slo: Slo | None = None,
        reference: Reference | None = None,
        *,
        sink: Sink | None = None,
        series: Series | None = None,
        exact_limit: int = EXACT_LIMIT,
    ) -> None:
        self.attainment = None if slo is None else Attainment(slo, reference, exact_limit)
        self.series = Series() if series is None else series
        self.samples = {name: Samples(exact_limit) for name in LATENCIES}
        """By latency, of the requests that finished; transfers only of those that had one."""
        self.classes: dict[int, dict[str, Samples]] = {}
        """The same by priority, as soon as there are two."""
        self.gaps_ps = Histogram()
        """Times between two tokens of a request, in picoseconds."""
        self.timeline = Timeline(LEVELS, COUNTERS)
        self.totals = Totals()
        self._sink = sink
        self._exact_limit = exact_limit
        self._ends: list[Ended] = []
        self._steps: list[int] = []
        self._late: list[int] = []
        self._gaps: list[int] = []

    def finished(self, live: Ended) -> None:
        """A request ended, whatever the outcome. Its fields must not change any more."""
        ends = self._ends
        ends.append(live)
        if len(ends) >= _ENDS:
            self._flush_ends()

    def steps(self, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        """Consecutive steps, step j of which took first_ps + j * slope_ps and gave each of `decodes` requests a token.

        The token before was given by the step before; see `late_step` for those that waited (sim/gaps.py).
        """
        buffer = self._steps
        buffer += (first_ps, slope_ps, steps, decodes, 0)
        if len(buffer) >= _STEP_WORDS:
            self._flush_steps()

    def prompt_step(self, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        """A step that computed prompt chunks, and a token for each of `decodes` requests."""
        buffer = self._steps
        buffer += (duration_ps, 0, 1, decodes, prompt_tokens)
        if len(buffer) >= _STEP_WORDS:
            self._flush_steps()

    def late_step(self, duration_ps: int, prompt_tokens: int, decodes: int, waits: list[tuple[int, int]]) -> None:
        """One step, before which some of its decodes had waited since their last token: (wait_ps, how many) each."""
        self._late += (duration_ps, 0, 1, decodes, prompt_tokens)
        on_time = decodes
        for wait_ps, count in waits:
            self._gaps += (wait_ps + duration_ps, count)
            on_time -= count
        self._gaps += (duration_ps, on_time)
        if len(self._gaps) >= _STEP_WORDS:
            self._flush_steps()

    def sample(self, now_ns: int, rows: Sequence[InstanceSample]) -> None:
        """The state of all instances, taken periodically."""
        self.series.add(now_ns, rows)

    def lost(self, requests: int) -> bool:
        """Whether a run of `requests` requests can no longer keep its service level, for a search that stops early."""
        self.flush()
        return self.attainment is not None and self.attainment.lost(requests)

    def flush(self) -> None:
        """Take in all that lies in the buffers."""
        if self._ends:
            self._flush_ends()
        if self._steps or self._late:
            self._flush_steps()

    def figures(self) -> RecordFigures:
        """All figures of the run so far; see record_figures for what each says."""
        self.flush()
        gaps, attainment = self.gaps_ps, self.attainment
        slo = None if attainment is None else attainment.figures(gaps, gaps_per_ns=1000)
        return describe_record(self.totals, self.samples, self.classes, gaps, self.timeline, slo)

    def _flush_ends(self) -> None:
        columns = _columns(self._ends, whole=self._sink is not None)
        # A new list, so that a sink that fails cannot make the next call count these twice.
        self._ends = []
        done = columns["outcome"] == 0
        if not done.all():
            refused = int(len(done) - done.sum())
            self.totals.rejected += int((columns["outcome"] == 1).sum())
            self.totals.failed += int((columns["outcome"] == 2).sum())
            if self.attainment is not None:
                self.attainment.refused(refused)
        self._count_presence(columns)
        self._count_finished({name: column[done] for name, column in columns.items()} if not done.all() else columns)
        if self._sink is not None:
            self._sink(columns)

    def _count_presence(self, columns: Columns) -> None:
        """Arrivals, waiting and presence, of all requests."""
        arrival, totals, line = columns["arrival_ns"], self.totals, self.timeline
        end = np.where(columns["finish_ns"] >= 0, columns["finish_ns"], arrival)
        scheduled = columns["scheduled_ns"]
        totals.first_arrival_ns = min(totals.first_arrival_ns, int(arrival.min()))
        totals.last_arrival_ns = max(totals.last_arrival_ns, int(arrival.max()))
        totals.last_end_ns = max(totals.last_end_ns, int(end.max()))
        totals.preemptions += int(columns["preemptions"].sum())
        totals.preempted_requests += int((columns["preemptions"] > 0).sum())
        totals.migrations += int(columns["migrations"].sum())
        line.count(ARRIVED, arrival)
        line.change(PRESENT, arrival, 1.0)
        line.change(PRESENT, end, -1.0)
        line.change(WAITING, arrival, 1.0)
        line.change(WAITING, np.where(scheduled >= 0, scheduled, end), -1.0)

    def _count_finished(self, columns: Columns) -> None:
        """Latencies, tokens and goodness, of those that finished."""
        if len(columns["arrival_ns"]) == 0:
            return
        arrival, first, finish = columns["arrival_ns"], columns["first_ns"], columns["finish_ns"]
        generated, prompts = columns["generated"], columns["prompt_tokens"]
        many = generated > 1
        tpot = np.where(many, (finish - first) // np.maximum(generated - 1, 1), -1)
        e2e, ttft = finish - arrival, first - arrival
        moved = columns["transfer_ns"] > 0
        found = {
            "ttft_ns": ttft,
            "tpot_ns": tpot[many],
            "e2e_ns": e2e,
            "queue_ns": columns["scheduled_ns"] - arrival,
            "transfer_ns": columns["transfer_ns"][moved],
            "normalized_ns": e2e // np.maximum(generated, 1),
        }
        self._count_classes(columns["priority"], ttft, tpot, e2e)
        for name, values in found.items():
            self.samples[name].add(values)
        totals = self.totals
        totals.finished += len(finish)
        totals.prompt_tokens += int(prompts.sum())
        totals.output_tokens += int(generated.sum())
        totals.cached_tokens += int(columns["cached_tokens"].sum())
        totals.transfers += int(moved.sum())
        totals.decode_span_ns += int((finish - first).sum())
        self._count_tokens(first, finish, generated, prompts)
        if self.attainment is not None:
            good = self.attainment.add(Latencies(ttft, tpot, e2e), prompts, generated)
            self.timeline.count(GOOD, finish[good])

    def _count_tokens(self, first: IntArray, finish: IntArray, generated: IntArray, prompts: IntArray) -> None:
        """Tokens after the first are spread evenly from the first to the last."""
        line = self.timeline
        line.count(FINISHED, finish)
        line.count(PROMPTS, first, prompts)
        line.change(DECODING, first, 1.0)
        line.change(DECODING, finish, -1.0)
        spread = finish > first
        line.count(FIRSTS, first, np.where(spread, 1, generated))
        rate = (generated - 1)[spread] / (finish - first)[spread]
        line.change(OUTPUT, first[spread], rate)
        line.change(OUTPUT, finish[spread], -rate)

    def _count_classes(self, priority: IntArray, ttft: IntArray, tpot: IntArray, e2e: IntArray) -> None:
        """By priority. While there is only one, the class is the whole; it is copied when a second one appears."""
        for value in np.unique(priority).tolist():
            if value in self.classes or len(self.classes) >= _MOST_CLASSES:
                continue
            if len(self.classes) == 1:
                (only,) = self.classes
                self.classes[only] = {name: self._copy(name) for name in _CLASS_LATENCIES}
            self.classes[value] = {name: Samples(self._exact_limit) for name in _CLASS_LATENCIES}
        if len(self.classes) < 2:
            return
        for value, samples in self.classes.items():
            here: NDArray[np.bool_] = priority == value
            if here.any():
                samples["ttft_ns"].add(ttft[here])
                samples["tpot_ns"].add(tpot[here & (tpot >= 0)])
                samples["e2e_ns"].add(e2e[here])

    def _copy(self, name: str) -> Samples:
        samples = Samples(self._exact_limit)
        samples.merge(self.samples[name])
        return samples

    def _flush_steps(self) -> None:
        figures = self.totals.step_figures
        if self._steps:
            first, slope, steps, decodes, prompts = _table(self._steps, _STEP_FIELDS)
            self._steps = []
            self.gaps_ps.add_progressions(first, slope, steps, decodes)
            figures.add(first, slope, steps, decodes, prompts)
        if self._late:
            gaps, counts = _table(self._gaps, 2)
            self.gaps_ps.add(gaps, counts)
            figures.add(*_table(self._late, _STEP_FIELDS))
            self._late, self._gaps = [], []


def _table(flat: list[int], width: int) -> IntArray:
    """Rows that lie one after another, as columns."""
    table: IntArray = np.ascontiguousarray(np.array(flat, dtype=np.int64).reshape(-1, width).T)
    return table


def _columns(lives: Sequence[Ended], *, whole: bool) -> dict[str, IntArray]:
    """COLUMNS of requests, all of them or only what the figures need; None becomes -1."""
    requests = [live.request for live in lives]
    columns = {
        name: _column(read, requests if name in _REQUEST else lives)
        for name, read in _READERS.items()
        if whole or name not in _ONLY_FOR_SINKS
    }
    columns["outcome"] = np.array([_CODES[live.outcome] for live in lives], dtype=np.int64)
    return columns


def _column(read: Callable[[Any], int | None], rows: Sequence[Any]) -> IntArray:
    try:
        return np.fromiter(map(read, rows), dtype=np.int64, count=len(rows))
    except TypeError:
        return np.array([-1 if value is None else value for value in map(read, rows)], dtype=np.int64)
