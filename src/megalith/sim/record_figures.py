"""From the totals of a recorded run to its figures: rates, occupancy, and the window in which they are taken.

Knows sums, samples and a timeline; must not know how they were collected. Every figure here is simulated.

The window. Rates over a whole run are pulled down by the ramp, when the cluster fills, and the drain, when nothing
comes any more. The steady window leaves both out: it starts one 90th percentile of the end-to-end time after the first
arrival, but at most a quarter into the arrivals, and ends with the last arrival; it is cut to whole bins of the
timeline. Where no bin is left (all requests came at once) it is the whole run, and `whole` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from megalith.base.units import NS_PER_S
from megalith.sim.attainment import AttainmentFigures
from megalith.sim.histogram import RELATIVE_ERROR, Histogram, IntArray
from megalith.sim.samples import Distribution, Samples, rounded_mean
from megalith.sim.timeline import Timeline

PRESENT, WAITING, DECODING, OUTPUT = range(4)
"""Levels of the timeline: requests in the cluster, not yet scheduled, between first and last token; tokens a ns."""
ARRIVED, FINISHED, GOOD, PROMPTS, FIRSTS = range(5)
"""Counters of it: requests that came, that finished, that were good; prompt tokens done; first tokens."""
LEVELS, COUNTERS = 4, 5

_NEVER = (1 << 63) - 1
_PS_PER_NS = 1000


@dataclass(slots=True)
class StepFigures:
    """Sums over the steps of all instances."""

    steps: int = 0
    prompt_steps: int = 0
    """Those with prompt chunks in them."""
    prompt_tokens: int = 0
    decode_tokens: int = 0
    busy_ps: int = 0
    decode_time_ps: int = 0
    """Durations times decodes."""

    def add(self, first: IntArray, slope: IntArray, steps: IntArray, decodes: IntArray, prompts: IntArray) -> None:
        """Take segments: steps of first + j * slope picoseconds."""
        durations = steps * first + slope * (steps * (steps - 1) // 2)
        self.steps += int(steps.sum())
        self.prompt_steps += int((prompts > 0).sum())
        self.prompt_tokens += int(prompts.sum())
        self.decode_tokens += int((steps * decodes).sum())
        # In halves, so that no sum leaves 64 bits.
        high, low = durations >> 31, durations & ((1 << 31) - 1)
        self.busy_ps += (int(high.sum()) << 31) + int(low.sum())
        self.decode_time_ps += (int(high @ decodes) << 31) + int(low @ decodes)


@dataclass(slots=True)
class Totals:
    """Sums over the requests of a run."""

    finished: int = 0
    rejected: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    """These five: of the requests that finished."""
    output_tokens: int = 0
    cached_tokens: int = 0
    transfers: int = 0
    decode_span_ns: int = 0
    """From the first to the last token."""
    preemptions: int = 0
    preempted_requests: int = 0
    migrations: int = 0
    first_arrival_ns: int = _NEVER
    last_arrival_ns: int = 0
    last_end_ns: int = 0
    step_figures: StepFigures = field(default_factory=StepFigures)


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Rates and occupancy over one stretch of the run; tokens after the first of a request count as evenly spread."""

    start_ns: int
    end_ns: int
    whole: bool
    """The stretch is the whole run, ramp and drain included."""
    requests_per_s: float
    """Finished."""
    good_per_s: float | None
    """Goodput: within the service level; None without one."""
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    mean_present: float
    """Requests in the cluster, time-weighted."""
    mean_waiting: float
    """Of those, not yet scheduled for the first time."""
    mean_decoding: float
    """Of those, between their first and last token."""
    peak_present: float
    """The largest mean over one bin of the timeline."""


class RecordFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All that a recorder knows of a run. Distributions are of the requests that finished, in ns."""

    finished: int
    rejected: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """Prompt tokens that a prefix cache had, of the requests that finished."""
    transfers: int
    """Finished requests whose KV moved from a prefill to a decode instance."""
    preemptions: int
    preempted_requests: int
    migrations: int
    latencies: dict[str, Distribution | None]
    """ttft_ns, tpot_ns, itl_ns, e2e_ns, queue_ns, transfer_ns, normalized_ns (end to end per output token)."""
    by_priority: dict[str, dict[str, Distribution | None]]
    """ttft_ns, tpot_ns, e2e_ns by priority; empty when there was only one."""
    paused_share: float
    """Of the time from first to last tokens, that which is in no gap of itl_ns: preempted, or its KV under way."""
    run: Rates
    steady: Rates
    """Without the ramp and the drain."""
    steps: int
    prompt_steps: int
    step_prompt_tokens: int
    """Prompt tokens computed, recomputation after preemptions included and cached ones not."""
    step_decode_tokens: int
    busy_s: float
    """Time in steps, summed over instances."""
    mean_decodes: float
    """Decodes in a step, weighted by its duration."""
    slo: AttainmentFigures | None


def describe_record(
    totals: Totals,
    samples: Mapping[str, Samples],
    classes: Mapping[int, Mapping[str, Samples]],
    gaps_ps: Histogram,
    timeline: Timeline,
    slo: AttainmentFigures | None,
) -> RecordFigures:
    """The figures of a run; `gaps_ps` are the times between two tokens of a request."""
    step = totals.step_figures
    latencies = {name: found.describe() for name, found in samples.items()}
    latencies["itl_ns"] = _gaps(gaps_ps)
    return RecordFigures(
        finished=totals.finished,
        rejected=totals.rejected,
        failed=totals.failed,
        prompt_tokens=totals.prompt_tokens,
        output_tokens=totals.output_tokens,
        cached_tokens=totals.cached_tokens,
        transfers=totals.transfers,
        preemptions=totals.preemptions,
        preempted_requests=totals.preempted_requests,
        migrations=totals.migrations,
        latencies=latencies,
        by_priority={
            str(value): {name: found.describe() for name, found in classes[value].items()}
            for value in (sorted(classes) if len(classes) > 1 else ())
        },
        paused_share=max(0.0, 1 - gaps_ps.total / (totals.decode_span_ns * _PS_PER_NS))
        if totals.decode_span_ns
        else 0.0,
        run=_whole_run(totals, timeline, slo),
        steady=_steady(totals, samples["e2e_ns"], timeline, slo),
        steps=step.steps,
        prompt_steps=step.prompt_steps,
        step_prompt_tokens=step.prompt_tokens,
        step_decode_tokens=step.decode_tokens,
        busy_s=step.busy_ps / 1e12,
        mean_decodes=step.decode_time_ps / max(step.busy_ps, 1),
        slo=slo,
    )


def _whole_run(totals: Totals, timeline: Timeline, slo: AttainmentFigures | None) -> Rates:
    """From the first arrival to the last end."""
    start_ns = min(totals.first_arrival_ns, totals.last_end_ns)
    seconds = max(totals.last_end_ns - start_ns, 1) / NS_PER_S
    # Levels are zero outside the run, so their integrals over all bins are those over the run.
    bin_s = timeline.width_ns / NS_PER_S
    present, waiting, decoding = (
        float(timeline.means(level).sum()) * bin_s / seconds for level in (PRESENT, WAITING, DECODING)
    )
    return Rates(
        start_ns=start_ns,
        end_ns=totals.last_end_ns,
        whole=True,
        requests_per_s=totals.finished / seconds,
        good_per_s=None if slo is None else slo.good / seconds,
        output_tokens_per_s=totals.output_tokens / seconds,
        prompt_tokens_per_s=totals.prompt_tokens / seconds,
        mean_present=present,
        mean_waiting=waiting,
        mean_decoding=decoding,
        peak_present=float(timeline.means(PRESENT).max()),
    )


def _steady(totals: Totals, e2e: Samples, timeline: Timeline, slo: AttainmentFigures | None) -> Rates:
    """Between ramp and drain; see the head of this module."""
    first_ns, last_ns = totals.first_arrival_ns, totals.last_arrival_ns
    ramp_ns = min(e2e.percentile(90) if e2e.count else 0, (last_ns - first_ns) // 4)
    start, stop = timeline.window(min(first_ns + ramp_ns, last_ns), last_ns)
    if stop <= start:
        return _whole_run(totals, timeline, slo)
    width_ns = timeline.width_ns
    seconds = (stop - start) * width_ns / NS_PER_S

    def rate(counter: int) -> float:
        return float(timeline.counted(counter, start, stop).sum()) / seconds

    return Rates(
        start_ns=start * width_ns,
        end_ns=stop * width_ns,
        whole=False,
        requests_per_s=rate(FINISHED),
        good_per_s=None if slo is None else rate(GOOD),
        output_tokens_per_s=rate(FIRSTS) + float(timeline.means(OUTPUT, start, stop).mean()) * NS_PER_S,
        prompt_tokens_per_s=rate(PROMPTS),
        mean_present=float(timeline.means(PRESENT, start, stop).mean()),
        mean_waiting=float(timeline.means(WAITING, start, stop).mean()),
        mean_decoding=float(timeline.means(DECODING, start, stop).mean()),
        peak_present=float(timeline.means(PRESENT, start, stop).max()),
    )


def _gaps(gaps_ps: Histogram) -> Distribution | None:
    """Picoseconds as nanoseconds, each rounded to the nearest."""
    if gaps_ps.count == 0:
        return None
    p50, p90, p95, p99 = (rounded_mean(gaps_ps.percentile(percent), _PS_PER_NS) for percent in (50, 90, 95, 99))
    return Distribution(
        count=gaps_ps.count,
        mean=rounded_mean(gaps_ps.total, gaps_ps.count * _PS_PER_NS),
        minimum=rounded_mean(gaps_ps.minimum, _PS_PER_NS),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        maximum=rounded_mean(gaps_ps.maximum, _PS_PER_NS),
        error=RELATIVE_ERROR,
    )
