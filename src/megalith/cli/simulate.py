"""`megalith simulate`: what a fleet would do with a trace, under any policy, before anybody pays for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_tables, progress, result_console, warn

if TYPE_CHECKING:
    from megalith.report.table import Column, Table
    from megalith.sim.run import Run, SimResult
    from megalith.sim.scenario import Scenario
    from megalith.specs.fleet import FleetSpec

app = App(
    name="simulate",
    help="Run a simulated cluster on a trace, with the scheduler that serves real requests.",
    help_format="plaintext",
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


@Parameter(name="*", group="What to simulate")
@dataclass(frozen=True)
class What:
    """The scenario, by flags."""

    trace: str = ""
    """A trace file, a built-in workload or a drawn one (`poisson:rate=5,...`)."""
    model: str = ""
    """A model of the catalogue (`megalith models`)."""
    fleet: str = ""
    """Pools such as 4xh100-sxm:tp2, or a TOML file."""
    policy: tuple[str, ...] = ()
    """A set-up (splitwise, distserve, llumnix) or a batch policy of all pools (splitfuse, prefill-first, first-come);
    both may be given."""
    router: str | None = None
    """A router with options, such as prefix-aware or rebalance:threshold=10."""
    controller: tuple[str, ...] = ()
    """Controllers with options; each adds one."""
    slo: str | None = None
    """Service level, such as ttft=400ms,tpot=40ms@p90 or splitwise."""
    rate: float | None = None
    """Requests a second: the workload at another rate."""
    requests: int | None = None
    """Stop after so many requests."""
    seed: int = 0


@Parameter(name="*", group="How")
@dataclass(frozen=True)
class How:
    """Model formats, costs and details."""

    timer: str = "auto"
    """auto, operators, analytic, or a published model (see --list)."""
    weight_format: Annotated[str, Parameter(name="--format")] = "bf16"
    """Weights: bf16, fp8, int8, ..."""
    kv_format: Annotated[str, Parameter(name="--kv")] = "bf16"
    """KV cache: bf16 or fp8."""
    max_context: int | None = None
    """Most tokens of prompt and answer together."""
    max_new: str | None = None
    """What schedulers are told of an answer: context (default), a number, or true (an oracle)."""
    config: Path | None = None
    """A stored scenario (JSON); flags override it."""


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


def make_scenario(what: What, how: How) -> Scenario:
    """The scenario that the flags describe. Raises ConfigError."""
    import msgspec

    from megalith.base.config import convert
    from megalith.sim.scenario import Scenario
    from megalith.specs.slo import parse_slo
    from megalith.specs.workload_text import parse_workload

    stored: Scenario | None = None
    if how.config is not None:
        try:
            stored = convert(msgspec.json.decode(how.config.read_bytes()), Scenario, str(how.config))
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"The scenario {how.config} cannot be read ({error}).", "Give a scenario.json.") from None
    else:
        for name in ("trace", "model", "fleet"):
            if not getattr(what, name):
                raise ConfigError(f"`megalith simulate` needs --{name}.", "`megalith simulate --help` has examples.")
    workload = parse_workload(what.trace) if what.trace or stored is None else stored.workload
    if what.rate is not None:
        from megalith.specs.workload_rate import at_rate

        workload = at_rate(workload, what.rate)
    if what.requests is not None:
        workload = msgspec.structs.replace(workload, requests=what.requests)
    if how.max_new is not None:
        told: int | str = int(how.max_new) if how.max_new.isdigit() else how.max_new
        workload = convert(msgspec.to_builtins(workload) | {"max_new": told}, type(workload), "--max-new")
    fleet = _fleet(what, stored.fleet if stored is not None else None)
    given: dict[str, Any] = {
        "fleet": fleet,
        "workload": workload,
        "seed": what.seed,
        "timer": how.timer,
        "weight_format": how.weight_format,
        "kv_format": how.kv_format,
        "max_context": how.max_context,
    }
    if what.model:
        given["model"] = what.model
    if what.slo is not None:
        given["slo"] = parse_slo(what.slo)
    if stored is None:
        return Scenario(**given)
    defaults = {field.name: field.default for field in msgspec.structs.fields(Scenario)}
    changed = {name: value for name, value in given.items() if value != defaults.get(name)}
    return msgspec.structs.replace(stored, **changed)


def _fleet(what: What, stored: FleetSpec | None) -> FleetSpec:
    import msgspec

    from megalith.policy.batching import POLICY_NAMES
    from megalith.sim.setups import SETUPS, apply
    from megalith.specs.fleet_text import parse_fleet, parse_policy

    fleet = parse_fleet(what.fleet) if what.fleet or stored is None else stored
    for name in what.policy:
        if name in POLICY_NAMES:
            pools = tuple(msgspec.structs.replace(pool, policy=name) for pool in fleet.pools)
            fleet = msgspec.structs.replace(fleet, pools=pools)
        elif name in SETUPS:
            fleet = apply(name, fleet)
        else:
            known = ", ".join([*SETUPS, *POLICY_NAMES])
            raise ConfigError(f"There is no policy {name!r}.", f"Known: {known}; routers go with --router.")
    if what.router is not None:
        fleet = msgspec.structs.replace(fleet, router=parse_policy(what.router))
    if what.controller:
        more = tuple(parse_policy(text) for text in what.controller)
        fleet = msgspec.structs.replace(fleet, controllers=(*fleet.controllers, *more))
    return fleet


def start(scenario: Scenario, files: object = None) -> Run:
    """A run of the scenario, recording into `files`; `this-machine` is a device too."""
    from megalith.cli.simulate_output import Files
    from megalith.sim.build import Builder
    from megalith.sim.run import Run

    profiles = {}
    if any(pool.device == "this-machine" for pool in scenario.fleet.pools):
        from megalith.plan import machine

        profiles["this-machine"] = machine.here("native")
    run = Run(scenario, Builder(scenario, profiles=profiles), files.recorder() if isinstance(files, Files) else None)
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
