"""What a simulated run says to a person and to a program: figures, tables, one JSON document.

Knows results; must not know how they came about. Every figure is simulated and labelled so, but for the time that this
machine took, which is measured and stands apart: without that block two runs of one scenario give the same document.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal

import msgspec

from megalith.base.units import NS_PER_S, format_duration
from megalith.report.table import Column, Kind, Table
from megalith.sim.pooled import PooledCounters
from megalith.sim.record_figures import RecordFigures
from megalith.sim.run import SimResult

FORMAT = "megalith.simulate/1"
PS_PER_MS = 10**9

_LATENCIES = {
    "ttft_ns": "TTFT", "tpot_ns": "TPOT", "itl_ns": "ITL", "e2e_ns": "E2E", "queue_ns": "queue",
    "transfer_ns": "KV transfer", "normalized_ns": "E2E per token",
}  # fmt: skip


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet was and what it took. None: not known for this fleet or not sampled."""

    instances: dict[str, int]
    """By pool, at the end of the run."""
    devices: int
    busy_share: float | None
    """Of instance time, that in steps."""
    kv_peak_share: float | None
    """The fullest KV cache of any sample."""
    energy_j: float | None
    """Of all instances over the run, idle time included."""
    peak_power_w: float | None
    joules_per_token: float | None
    """Per output token of finished requests."""
    price_per_hour_usd: float | None
    price_per_million_tokens_usd: float | None
    """Per million output tokens at the steady rate."""
    instance_hours: float
    """Instances that were on, starting and draining ones included, times hours."""
    events: dict[str, int]
    """What moved or broke: hand-offs, migrations, failures, starts, brakes; what never happened is left out."""


class RunFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run in figures."""

    format: str
    nature: Literal["simulated"]
    settings: dict[str, str]
    """What a person asked for, in words; print it above the tables."""
    scenario: dict[str, Any]
    """The resolved configuration of the run."""
    seed: int
    digest: str
    stopped_early: bool
    simulated_s: float
    events: int
    record: RecordFigures
    prefix_hit_share: float | None
    """Of the prompt tokens that were admitted, those that a prefix cache had; None without one."""
    resources: Resources
    timing: dict[str, str]
    """By pool, how its steps were timed."""
    notes: list[str]


class MachineTime(msgspec.Struct, frozen=True, kw_only=True):
    """What the simulation itself took on this machine."""

    nature: Literal["measured"]
    cpu_s: float
    requests_per_cpu_s: float
    events_per_cpu_s: float


def run_figures(result: SimResult, settings: Mapping[str, str] | None = None) -> RunFigures:
    """The figures of a run; `settings` describe it in words (fleet, trace, policy)."""
    return RunFigures(
        format=FORMAT,
        nature="simulated",
        settings=dict(settings or {}),
        scenario=_strict(msgspec.to_builtins(result.scenario)),
        seed=result.scenario.seed,
        digest=result.digest,
        stopped_early=result.stopped_early,
        simulated_s=result.end_ns / NS_PER_S,
        events=result.events,
        record=result.figures,
        prefix_hit_share=_finite(result.prefix_hit_share),
        resources=_resources(result),
        timing=dict(result.timing),
        notes=[*_notes(result.figures), *result.notes],
    )


def machine_time(result: SimResult, cpu_s: float) -> MachineTime:
    """`cpu_s` is the processor time of the run, measured by the caller."""
    seconds = max(cpu_s, 1e-9)
    return MachineTime(
        nature="measured",
        cpu_s=cpu_s,
        requests_per_cpu_s=result.requests / seconds,
        events_per_cpu_s=result.events / seconds,
    )


def run_document(figures: RunFigures, machine: MachineTime | None = None) -> bytes:
    """The JSON document of a run: keys in a fixed order, no NaN or infinity (they are null)."""
    body = msgspec.to_builtins(figures)
    if machine is not None:
        body["machine"] = msgspec.to_builtins(machine)
    return msgspec.json.format(msgspec.json.encode(_strict(body)), indent=2) + b"\n"


def run_tables(figures: RunFigures, machine: MachineTime | None = None) -> dict[str, Table]:
    """The tables of a run by name: requests, rates, latencies, service_level (with one), resources, machine."""
    tables = {
        "requests": _requests_table(figures),
        "rates": _rates_table(figures.record),
        "latencies": _latency_table(figures.record),
    }
    if figures.record.slo is not None:
        tables["service_level"] = _slo_table(figures.record)
    tables["resources"] = _resources_table(figures.resources)
    if machine is not None:
        tables["machine"] = _machine_table(machine)
    last = tables["machine" if machine is not None else "resources"]
    happened = ", ".join(f"{count:,} {name}" for name, count in figures.resources.events.items())
    last.notes.extend(
        [
            *([f"Simulated: {happened}."] if happened else []),
            *figures.notes,
            f"seed {figures.seed}, digest {figures.digest}",
        ]
    )
    return tables


def _resources(result: SimResult) -> Resources:
    series, figures = result.series, result.figures
    sampled = series.samples > 0
    width = {pool.name: pool.tensor_parallel * pool.pipeline_parallel for pool in result.scenario.fleet.pools}
    # A device without known power gives NaN, and the sum with it.
    energy_j = _finite(series.energy_j) if sampled else None
    price, rate = result.price_per_hour_usd, figures.steady.output_tokens_per_s
    tokens = figures.output_tokens
    return Resources(
        instances=dict(result.instances),
        devices=sum([count * width[pool] for pool, count in result.instances.items()]),
        busy_share=series.mean("busy_share"),
        kv_peak_share=series.peak_used_share if sampled else None,
        energy_j=energy_j,
        peak_power_w=None if energy_j is None else series.peak_power_w,
        joules_per_token=None if energy_j is None or not tokens else energy_j / tokens,
        price_per_hour_usd=price,
        price_per_million_tokens_usd=None if price is None or rate <= 0 else price / (rate * 3600) * 1e6,
        instance_hours=result.instance_hours,
        events={name: count for name, count in _happened(result).items() if count},
    )


def _happened(result: SimResult) -> dict[str, int]:
    handoffs, moves, faults, scaling = result.handoffs, result.migrations, result.faults, result.scaling
    happened = {
        "hand-offs": handoffs.done, "hand-offs that waited": handoffs.waited, "hand-offs given up": handoffs.kept,
        "migrations": moves.done, "migrations aborted": moves.aborted, "migrations refused": moves.refused,
        "failures": faults.failures, "repairs": faults.repairs, "requests re-queued by failures": faults.requeued,
        "stragglers": faults.stragglers, "instances started": scaling.started, "instances stopped": scaling.stopped,
    }  # fmt: skip
    if result.power is not None:
        happened |= {"power samples above budget": result.power.violations, "brakes": result.power.brakes}
    if result.pooled is not None:
        happened |= _pooled(result.pooled)
    return happened


def _pooled(pooled: PooledCounters) -> dict[str, int]:
    steps = pooled.steps
    return {
        "KV moves": pooled.moved, "blocks moved": pooled.moved_blocks, "bytes moved": pooled.moved_bytes,
        "KV placements": pooled.placed, "blocks placed": pooled.placed_blocks, "placements lapsed": pooled.lapsed,
        "KV moves refused": pooled.refused, "KV moves aborted": pooled.aborted,
        "requests recomputed for a lost holder": pooled.recomputed, "blocks lent at most": pooled.most_lent_blocks,
        "steps with KV elsewhere": steps.steps, "tokens attended to elsewhere": steps.remote_tokens,
        "bytes of queries and results": steps.query_bytes, "bytes of prompt KV sent": steps.streamed_bytes,
        "ms waited for other instances": steps.waited_ps // PS_PER_MS,
        "ms of attention for others": steps.foreign_ps // PS_PER_MS,
    }  # fmt: skip


def _notes(record: RecordFigures) -> list[str]:
    """What a reader must know beside the figures."""
    notes = []
    rough = {d.error for name, d in record.latencies.items() if d is not None and name != "itl_ns"} - {0.0}
    if rough:
        notes.append(f"Too many requests to keep: percentiles are within {max(rough):.2%}; the rest is exact.")
    itl = record.latencies.get("itl_ns")
    if itl is not None:
        notes.append(f"Percentiles of ITL are within {itl.error:.2%}.")
    if record.paused_share > 0.01:
        pauses = "preempted or its KV under way; TPOT and E2E have it"
        notes.append(f"ITL leaves out {record.paused_share:.1%} of the decoding time, when a request was {pauses}.")
    if record.steady.whole:
        notes.append("Too short to leave out ramp and drain: the steady rates are those of the whole run.")
    if record.failed:
        notes.append(f"{record.failed:,} requests failed and are in no latency; they count against the service level.")
    return notes


def _requests_table(figures: RunFigures) -> Table:
    record = figures.record
    names = ("finished", "rejected", "failed", "preemptions", "migrations", "transfers")
    columns = [Column(name, name, "count", "simulated") for name in names]
    columns += [
        Column("prompt_tokens", "prompt tokens", "count", "simulated"),
        Column("output_tokens", "output tokens", "count", "simulated"),
        Column("prefix_hit_share", "prefix hits", "share", "simulated"),
    ]
    table = Table(columns, title="Simulated run")
    counts = [getattr(record, name) for name in names]
    table.add(*counts, record.prompt_tokens, record.output_tokens, figures.prefix_hit_share)
    if figures.stopped_early:
        table.notes.append("Stopped early: what comes after is not in any figure.")
    return table


def _rates_table(record: RecordFigures) -> Table:
    columns = [
        Column("stretch", "stretch"),
        Column("requests_per_s", "requests/s", "number", "simulated"),
        Column("good_per_s", "goodput/s", "number", "simulated"),
        Column("output_tokens_per_s", "output tok/s", "number", "simulated", digits=4),
        Column("prompt_tokens_per_s", "prompt tok/s", "number", "simulated", digits=4),
        Column("mean_present", "in cluster", "number", "simulated"),
        Column("mean_waiting", "waiting", "number", "simulated"),
        Column("mean_decoding", "decoding", "number", "simulated"),
        Column("peak_present", "peak", "number", "simulated"),
    ]
    table = Table(columns)
    for name, rates in (("whole run", record.run), ("steady", record.steady)):
        table.add(name, *(getattr(rates, column.key) for column in columns[1:]))
    start, end = format_duration(record.steady.start_ns), format_duration(record.steady.end_ns)
    table.notes.append(f"steady: from {start} to {end} of simulated time, without the ramp and the drain")
    return table


def _latency_table(record: RecordFigures) -> Table:
    fields = ("mean", "p50", "p90", "p95", "p99", "maximum")
    columns = [Column("metric", "latency"), Column("count", "samples", "count", "simulated")]
    columns += [Column(f"{name}_ns", name, "duration_ns", "simulated") for name in fields]
    table = Table(columns)
    for key, title in _LATENCIES.items():
        found = record.latencies.get(key)
        if found is not None:
            table.add(title, found.count, *(getattr(found, name) for name in fields))
    for priority, latencies in record.by_priority.items():
        for key, found in latencies.items():
            if found is not None:
                title = f"{_LATENCIES[key]}, priority {priority}"
                table.add(title, found.count, *(getattr(found, name) for name in fields))
    return table


def _slo_table(record: RecordFigures) -> Table:
    slo = record.slo
    columns = [
        Column("bound", "bound"),
        Column("wanted_share", "must keep it", "share"),
        Column("share", "keep it", "share", "simulated"),
        Column("observed", "figure / limit", "number", "simulated"),
        Column("margin", "margin", "share", "simulated"),
        Column("kept", "kept", "text", "simulated"),
    ]
    table = Table(columns)
    if slo is None:
        return table
    for verdict in slo.verdicts:
        table.add(*(getattr(verdict, column.key) for column in columns))
    table.title = f"Service level {'kept' if slo.kept else 'NOT kept'}: {slo.attainment:.1%} of all requests are good"
    if slo.binding is not None:
        if slo.margin is None:
            left = "more requests were refused than it allows"
        else:
            left = f"{abs(slo.margin):.1%} {'above the limit' if slo.margin < 0 else 'of the limit left'}"
        table.notes.append(f"binding: {slo.binding}, {left}")
    if len(slo.shares) > 1:
        each = ", ".join(f"{bound} {share:.1%}" for bound, share in slo.shares.items())
        table.notes.append(f"within each by itself: {each}")
    return table


def _resources_table(resources: Resources) -> Table:
    kinds: dict[str, tuple[str, Kind]] = {
        "devices": ("devices", "count"),
        "busy_share": ("busy", "share"),
        "kv_peak_share": ("KV peak", "share"),
        "energy_j": ("energy, J", "count"),
        "peak_power_w": ("peak power, W", "count"),
        "joules_per_token": ("J/token", "number"),
        "instance_hours": ("instance hours", "number"),
        "price_per_hour_usd": ("$/h", "number"),
        "price_per_million_tokens_usd": ("$/million tokens", "number"),
    }
    table = Table([Column(key, title, kind, "simulated") for key, (title, kind) in kinds.items()])
    table.add(*(getattr(resources, key) for key in kinds))
    return table


def _machine_table(machine: MachineTime) -> Table:
    columns = [
        Column("cpu_s", "CPU s", "number", "measured"),
        Column("requests_per_cpu_s", "requests per CPU s", "count", "measured"),
        Column("events_per_cpu_s", "events per CPU s", "count", "measured"),
    ]
    table = Table(columns)
    table.add(machine.cpu_s, machine.requests_per_cpu_s, machine.events_per_cpu_s)
    return table


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _strict(value: Any) -> Any:
    """Without what JSON cannot say."""
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    return [_strict(inner) for inner in value] if isinstance(value, list | tuple) else value
