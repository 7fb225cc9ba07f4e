"""`megalith bench`: predicted against measured on this machine (the load generator `bench serve` has its own file)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_tables, progress, say

if TYPE_CHECKING:
    from megalith.engine.bench import BenchReport
    from megalith.engine.launch import BuiltEngine
    from megalith.report.table import Table

Mode = Literal["auto", "native", "bf16", "float32"]

app = App(
    name="bench",
    help="Measure: predicted against measured, or load on an endpoint (`bench serve`).",
    help_format="plaintext",
    help_epilogue="""\
Times real steps of the engine's runner at 48 points of (batch, context, prompt
length), fits this machine's profile to 23 of them and reports on the other 25.
`plan` and `serve` use the stored profile; the comparison is added to
bench/predictions.jsonl under the Megalith home.

Examples:
  megalith bench                             SmolLM2 135M, all cores
  megalith bench gemma3-270m --no-fit        predict with the stored profile
  megalith bench --mode bf16 --threads 1     the torch path on one core
  megalith bench --out predictions.jsonl --json""",
)


@app.default
def bench(
    model: str = "smollm2",
    *,
    mode: Mode = "auto",
    threads: int | None = None,
    rounds: int = 7,
    clock: Literal["wall", "processor"] = "wall",
    fit: bool = True,
    out: Path | None = None,
    json: JsonFlag = False,
) -> int:
    """Compare predicted with measured step times.

    Parameters
    ----------
    model
        A model whose weights are here.
    mode
        Which runner: auto (native where it can), native, bf16 or float32.
    threads
        Threads; by default one for each core.
    rounds
        Repetitions of every point; the shortest counts.
    clock
        wall, or processor: time on the core, for a machine that other programs share (with --threads 1).
    fit
        Fit and store the profile; with --no-fit the stored one predicts.
    out
        Also append the comparison to this file, as one JSON line.
    """
    from megalith.base.home import home_dir
    from megalith.plan import machine

    if clock == "processor" and threads != 1:
        raise ConfigError("The processor clock times the calling thread only.", "Add --threads 1.")
    report = _run(Run(model, mode, threads or machine.cores(), rounds, clock, fit))
    if fit:
        where = machine.profile_path(report.profile.kind, report.threads)
        say(f"profile stored in {machine.store(where, report.profile)}")
    for path in (home_dir() / "bench" / "predictions.jsonl", out):
        if path is not None:
            _append(path, report)
    facts = {"median_error": report.median_error(), "coverage": report.coverage(), "profile": report.profile}
    print_tables({"steps": step_table(report), "memory": memory_table(report)}, json=json, facts=facts)
    return 0


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be timed, and how."""

    model: str
    mode: Mode
    threads: int
    rounds: int
    clock: str
    fit: bool


def _run(run: Run) -> BenchReport:
    from megalith.engine import bench as points
    from megalith.engine.api import EngineConfig
    from megalith.engine.launch import build_engine

    config = EngineConfig(
        model=run.model, mode=run.mode, threads=run.threads, max_sequences=points.MAX_BATCH + 1,
        max_context=points.MAX_CONTEXT + 16, token_budget=points.MAX_BATCH + points.MAX_PROMPT,
        num_blocks=points.blocks_needed(16), num_host_blocks=points.host_blocks_needed(16),
    )  # fmt: skip
    say(f"loading {run.model}")
    built = build_engine(config)
    try:
        stage = points.Stage.on(built.runner)
        with progress("computing KV", points.MAX_CONTEXT // points.FILL_ROWS, "steps") as advance:
            stage.fill(advance)
        keys = [*points.CALIBRATION, *points.REPORTING]
        with progress("timing steps", run.rounds + 1, "rounds") as advance:
            points.measure(stage, keys, 1, advance)
            times = points.measure(stage, keys, run.rounds, advance, run.clock)
        return _report(built, times, run)
    finally:
        built.runner.close()


def _report(built: BuiltEngine, times: dict[tuple[int, int, int], list[int]], run: Run) -> BenchReport:
    import msgspec

    from megalith.cost.compute import CostModel
    from megalith.engine import bench as points
    from megalith.plan import machine
    from megalith.plan.source import resolve

    kind, spec = built.fit.kind, built.model.spec
    planned = resolve(str(built.model.files.path))
    exact = built.fit.plan.kv_format == "f32"
    weights = planned.weights(kind, "f32" if exact else None)
    profile = (
        machine.uncalibrated(kind, run.threads, machine.stored_facts()) if run.fit else machine.here(kind, run.threads)
    )
    profile = msgspec.structs.replace(profile, versions={**profile.versions, "threads": str(run.threads)})
    cost = CostModel(spec, profile, weights, built.fit.plan.kv_format)
    name = built.model.files.name
    source = f"`megalith bench` on {len(points.CALIBRATION)} steps of {name} with the {built.runner.name} runner"
    fitted, rows = points.compare(cost, times, source if run.fit else None)
    return points.BenchReport(
        model=name, runner=built.runner.name, threads=run.threads, clock=run.clock, machine=machine.machine_name(),
        date=time.strftime("%Y-%m-%d"), profile=fitted, fitted=run.fit, rows=tuple(rows),
        memory_predicted={line.item: line.num_bytes for line in built.fit.plan.memory},
        memory_measured=dict(built.runner.memory_bytes()), load_average=os.getloadavg()[0],
    )  # fmt: skip


def _append(path: Path, report: BenchReport) -> None:
    import msgspec

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(report) + b"\n")


def step_table(report: BenchReport) -> Table:
    """The reporting points: what was predicted, what was measured, how far off."""
    from megalith.report.table import Column, Table

    table = Table(
        columns=(
            Column("batch", "batch", "count"),
            Column("context", "context", "count"),
            Column("prompt", "prompt rows", "count"),
            Column("predicted_ns", "step", "duration_ns", "predicted"),
            Column("low_ns", "low", "duration_ns", "predicted"),
            Column("high_ns", "high", "duration_ns", "predicted"),
            Column("measured_ns", "step", "duration_ns", "measured"),
            Column("error", "error", "share"),
        ),
        title=f"{report.model}, {report.runner}, {report.threads} threads, {report.machine}, {report.date}",
    )
    for row in report.reporting():
        table.add(
            row.batch, row.context, row.prompt, row.predicted_ns, row.low_ns, row.high_ns, row.measured_ns, row.error
        )
    most = max(row.repetitions for row in report.rows)
    worst = max(abs(row.error) for row in report.reporting())
    table.notes = [
        f"median error {report.median_error():.1%}, worst {worst:.1%} over {len(report.reporting())} points; "
        f"{report.coverage():.0%} inside the band",
        f"profile: {report.profile.source}" + (" (fitted in this run, on other points)" if report.fitted else ""),
        f"measured: {report.clock} time, the shortest of up to {most} repetitions; "
        f"load average {report.load_average:.1f}",
    ]
    return table


def memory_table(report: BenchReport) -> Table:
    """Memory of the instance: the plan's items beside what the runner says it holds."""
    from megalith.report.table import Column, Table

    table = Table(
        columns=(
            Column("item", "item"),
            Column("predicted_bytes", "bytes", "bytes", "predicted"),
            Column("measured_bytes", "bytes", "bytes", "measured"),
        ),
        title="Memory",
    )
    for item in {**report.memory_predicted, **report.memory_measured}:
        table.add(item, report.memory_predicted.get(item), report.memory_measured.get(item))
    return table
