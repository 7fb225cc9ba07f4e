"""`megalith simulate`: what a fleet would do with a trace, under any policy, before anybody pays for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.cli.output import JsonFlag, print_tables, progress, result_console, warn
from megalith.cli.scenario_flags import How, What, make_scenario

if TYPE_CHECKING:
    from megalith.report.table import Column, Table
    from megalith.sim.run import Run, SimResult
    from megalith.sim.scenario import Scenario

app = App(
    name="simulate",
    help="Run a simulated cluster on a trace, with the scheduler that serves real requests.",
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
)
_INTERRUPTED = 130
_EXAMPLES = """\
TRACE is a file (Azure CSV, Mooncake JSON lines, any CSV or JSON lines with a
column mapping), a built-in synthetic workload, or a drawn one. FLEET is
COUNTxDEVICE pools such as 4xh100-sxm:tp2, by role if you like, or a TOML
file. `megalith simulate --list` shows workloads, devices, policies and
set-ups. Every figure is simulated; the same seed gives the same digest.

Examples:
  megalith simulate --trace azure-conv --model llama-3.1-8b --fleet 4xh100-sxm
  megalith simulate --trace azure.csv.gz --model llama-2-70b \\
      --fleet prefill=25xh100-sxm:tp8,decode=15xh100-sxm:tp8 --policy splitwise
  megalith simulate --trace poisson:rate=8,input=512,output=128,requests=2000 \\
      --model qwen3-8b --fleet 2xl40s --slo ttft=400ms,tpot=50ms@p90
  megalith simulate --trace azure-code --model llama-3.1-8b --fleet 4xa100-80gb \\
      --policy llumnix --plot run.png --parquet out/ --trace-events run.json.gz"""
app.help_epilogue = _EXAMPLES
app.command(
    "megalith.cli.simulate_blocks:blocks", name="blocks", help="Simulate many fine-tuned models that share blocks."
)


@Parameter(name="*", group="Output")
@dataclass(frozen=True)
class Output:
    """Files to write."""

    plot: Path | None = None
    """Latency CDFs as a picture; occupancy and power beside it."""
    parquet: Path | None = None
    """A folder for requests.parquet, instances.parquet and scenario.json."""
    trace_events: Path | None = None
    """A Chrome or Perfetto trace (.json or .json.gz)."""


@app.default
def simulate(
    what: What | None = None,
    how: How | None = None,
    output: Output | None = None,
    *,
    list_: Annotated[bool, Parameter(name="--list", negative="", help="Show what can be named, and stop.")] = False,
    shadow: Annotated[Path | None, Parameter(help="Replay a recorded decision log and compare.")] = None,
    json: JsonFlag = False,
) -> int:
    """Simulate and report."""
    if list_:
        print_tables(_known(), json=json)
        return 0
    if shadow is not None:
        return _replay(shadow, json)
    from megalith.cli.simulate_output import Files

    output = output or Output()
    scenario = make_scenario(what or What(), how or How())
    files = Files(scenario, output.plot, output.parquet, output.trace_events)
    with files:
        run = start(scenario, files)
        begun_s = time.process_time()
        complete = _advance(run, scenario)
        cpu_s = time.process_time() - begun_s
        result = run.result()
        files.write(result)
    _report(result, cpu_s, json=json)
    if not complete:
        warn(f"stopped: {result.requests:,} requests had ended; the figures are of these.")
        return _INTERRUPTED
    return 0


def start(scenario: Scenario, files: object = None) -> Run:
    """A run of the scenario, recording into `files`; `this-machine` is a device too."""
    from megalith.cli.simulate_output import Files
    from megalith.sim.build import Builder
    from megalith.sim.run import Run

    profiles, spec, weights = {}, None, None
    if any(pool.device == "this-machine" for pool in scenario.fleet.pools):
        from megalith.plan import machine
        from megalith.plan.source import resolve

        profiles["this-machine"] = machine.here("native")
        planned = resolve(scenario.model)
        spec, weights = planned.spec, planned.weights("native", None)
    builder = Builder(scenario, spec, profiles, weights)
    run = Run(scenario, builder, files.recorder(builder) if isinstance(files, Files) else None)
    if isinstance(files, Files):
        files.watch(run)
    return run


def _advance(run: Run, scenario: Scenario) -> bool:
    """Run to the end with a progress bar; False when interrupted."""
    done = 0
    with progress("simulating", scenario.workload.requests, "requests") as advance:
        try:
            while run.advance():
                ended = run.progress.ended
                advance(ended - done)
                done = ended
        except KeyboardInterrupt:
            run.interrupt()
            return False
    return True


def _report(result: SimResult, cpu_s: float, *, json: bool) -> None:
    from megalith.cli.simulate_output import settings
    from megalith.sim.report import machine_time, run_document, run_figures, run_tables

    figures, machine = run_figures(result, settings(result.scenario)), machine_time(result, cpu_s)
    if json:
        import sys

        sys.stdout.buffer.write(run_document(figures, machine))
        sys.stdout.flush()
        return
    console = result_console()
    for name, text in figures.settings.items():
        console.print(f"{name}: {text}", soft_wrap=True)
    print_tables(run_tables(figures, machine), json=False)


def _replay(path: Path, json: bool) -> int:
    from megalith.cli.output import print_json
    from megalith.sim.shadow import replay

    report = replay(path)
    if json:
        print_json(report)
    else:
        result_console().print(str(report), soft_wrap=True)
    return 0 if report.identical else 1


def _known() -> dict[str, Table]:
    from megalith.cost.timer_published import published_timers
    from megalith.policy import registry
    from megalith.policy.batching import POLICY_NAMES
    from megalith.report.table import Table
    from megalith.sim.setups import SETUPS
    from megalith.specs import catalog
    from megalith.specs.workload_catalog import workloads

    setups = Table(_columns("name", "what", "source"), "set-ups (--policy)")
    for name, setup in SETUPS.items():
        setups.add(name, setup.summary, setup.source)
    for name in POLICY_NAMES:
        setups.add(name, "batch policy of all pools", "-")
    policies = Table(_columns("name", "kind", "what", "options"), "routers and controllers")
    for entry in registry.describe():
        policies.add(entry.name, entry.kind, entry.summary, ", ".join(entry.options))
    loads = Table(_columns("name", "what", "source"), "built-in workloads (synthetic)")
    for name, load in workloads().items():
        loads.add(name, load.title, load.source)
    devices = Table(_columns("name", "title"), "devices")
    for name, device in catalog.devices().items():
        devices.add(name, device.title)
    timers = Table(_columns("name", "model", "title"), "published timers (--timer)")
    for name, timer in published_timers().items():
        timers.add(name, timer.model, timer.title)
    return {"setups": setups, "policies": policies, "workloads": loads, "devices": devices, "timers": timers}


def _columns(*names: str) -> list[Column]:
    from megalith.report.table import Column

    return [Column(name, name) for name in names]
