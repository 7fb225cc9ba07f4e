"""Real against simulated: the live engine and the simulator on the same traces, latency by latency.

    python benchmarks/shadow.py [--clock processor|wall] [--driver loop|service] [--repeats 2] [--out shadow.jsonl]

Each run of the live engine (SmolLM2 135M, native backend, one thread, random prompts of the trace's lengths) writes a
decision log. Logs of calibration runs give this machine's profile (`cost.calibrate_steps`); every log, also those of
the reported traces, is replayed into fresh policy objects, which must decide the same. Then the simulator runs each
reported trace on one instance with the same scheduler options and that profile. No reported run is ever fitted.

`--clock processor` drives the engine on the processor time of its own thread, arrivals on the same clock and idle time
jumped over, so that other programs on the machine do not count to first order. They still share caches and memory, and
a virtual machine's speed wanders by itself; so calibration traces run beside each reported one on a second engine, in
turns of a quarter of a second, and say how fast the machine was at each moment. The profile is of all calibration steps
together; the simulated device is slower or faster at a moment as the calibration steps around that moment were
(`--speed run`: as those of the whole run were; `none`: always as in the profile).
`--clock wall` is the same on the wall's time, for an idle machine. `--driver service` goes through the asyncio engine,
as the server does, waits in real time (wall only), and has a calibration run before each reported one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import msgspec
from shadow_live import (
    BLOCK_TOKENS,
    BLOCKS,
    BUDGET,
    CONTEXT,
    POLICIES,
    SEQUENCES,
    TRACES,
    LiveEngine,
    LiveRun,
    Times,
)  # fmt: skip

from megalith.cost.calibrate import with_rates
from megalith.cost.calibrate_steps import bias, fit_steps
from megalith.cost.compute import CostModel
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.model.open import open_model
from megalith.plan import machine as plan_machine
from megalith.plan.source import resolve
from megalith.report.percentiles import percentile
from megalith.sim.build import Builder
from megalith.sim.record import Recorder
from megalith.sim.recorded import recorded_steps
from megalith.sim.run import Run
from megalith.sim.scenario import Scenario
from megalith.sim.shadow import replay
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec

METRICS = ("ttft", "tpot", "e2e")
BARS = {50: 0.10, 99: 0.20}


def main() -> None:
    """Record, fit, replay, simulate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clock", choices=["processor", "wall"], default="processor")
    parser.add_argument("--driver", choices=["loop", "service"], default="loop")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--speed", choices=["moment", "run", "none"], default="moment", help="of the machine: see above"
    )
    parser.add_argument("--logs", type=Path, help="keep the decision logs and measured times in this new folder")
    parser.add_argument("--read", type=Path, help="measure nothing: compare the runs that --logs kept in this folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("shadow.jsonl"))
    options = parser.parse_args()
    if options.driver == "service" and options.clock != "wall":
        parser.error("the service runs on the wall clock: add --clock wall")
    if options.clock == "wall":
        machine.raise_priority()
    if options.read:
        about = json.loads((options.read / "about.json").read_text())
        evaluate([LiveRun.read(path) for path in sorted(options.read.glob("*.run.json"))], about, options)
        return
    if options.logs:
        options.logs.mkdir(parents=True)
        study(options, options.logs)
        return
    with tempfile.TemporaryDirectory() as folder:
        study(options, Path(folder))


def study(options: argparse.Namespace, folder: Path) -> None:
    """All runs in turn, so that a busy spell hits them alike; then the comparison."""
    live = LiveEngine(options.clock, options.driver, folder)
    load, used_s = machine.Load(), time.process_time()
    for repeat in range(options.repeats):
        for name in TRACES:
            for policy in POLICIES:
                live.run(LiveRun(name, policy, repeat, folder))
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": machine.commit(),
        "machine": machine.describe(), "clock": options.clock, "driver": options.driver, "repeats": options.repeats,
        "other_cores": round(load.other_cores(time.process_time() - used_s), 2),
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))
    evaluate(live.runs, about, options)


def evaluate(runs: list[LiveRun], about: dict[str, Any], options: argparse.Namespace) -> None:
    """Fit, replay, simulate and compare; the row is appended to the output, the table printed."""
    steps = [step for run in runs for step in run.calibration_steps()]
    cost = blank_cost()
    fitted = with_rates(cost, fit_steps(cost, steps))
    print(f"fitted on {len(steps)} steps of the calibration runs", file=sys.stderr)
    row: dict[str, Any] = {
        **about, "speed": options.speed, "fit_steps": len(steps),
        "rates": msgspec.to_builtins(fitted.profile.rates),
        "shadow": [shadow(log, policy) for run in runs for log, policy in run.logs()],
        "rows": [
            compare([run for run in runs if (run.trace, run.policy) == (name, policy)], fitted, options.speed)
            for name in TRACES
            for policy in POLICIES
        ],
    }  # fmt: skip
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(table(row))


def blank_cost() -> CostModel:
    """The cost model of this model and runner with rates that are no measurement yet."""
    model = open_model("smollm2")
    weights = resolve(str(model.files.path)).weights("native", None)
    return CostModel(model.spec, plan_machine.uncalibrated("native", 1, plan_machine.stored_facts()), weights)


# The simulator


class Keeper(Recorder):
    """Keeps every request that ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[Any] = []

    def finished(self, live: Any) -> None:
        super().finished(live)
        self.ended.append(live)


def simulated(trace: str, policy: str, cost: CostModel, speeds: list[tuple[int, float]]) -> dict[int, Times]:
    """The trace on one simulated instance of this machine, with the scheduler options of the live engine."""
    workload, seed = TRACES[trace]
    pool = PoolSpec(
        name="here", device="this-machine", count=1, policy=policy, token_budget=BUDGET, max_sequences=SEQUENCES,
        max_waiting=1024 + SEQUENCES, block_tokens=BLOCK_TOKENS, kv_blocks=BLOCKS, watermark=0.01,
    )  # fmt: skip
    scenario = Scenario(
        model=cost.spec.name, fleet=FleetSpec(pools=(pool,), router=PolicySpec(name="round-robin")), workload=workload,
        seed=seed, timer="analytic", max_context=CONTEXT,
    )  # fmt: skip
    keeper = Keeper()
    run = Run(scenario, Builder(scenario, cost.spec, {"this-machine": cost.profile}), keeper)
    (instance,) = run.cluster.instances.values()
    instance.timer = AnalyticTimer(cost, speeds[0][1])

    def change_speed(factor: float) -> None:
        instance.interrupt(run.kernel.now_ns)
        instance.timer = AnalyticTimer(cost, factor)

    for at_ns, factor in speeds[1:]:
        run.kernel.at(at_ns, change_speed, factor)
    while run.advance():
        pass
    return {
        live.request.id: Times(live.request.arrival_ns, live.output_tokens, live.first_ns, live.finish_ns)
        for live in keeper.ended
    }


# The comparison


def shadow(log: Path, policy: str) -> dict[str, Any]:
    """The shadow test of one run, with two controls."""
    report = replay(log)
    other = next(name for name in POLICIES if name != policy)
    caught = [not replay(log, token_budget=BUDGET // 2).identical, not replay(log, policy=other).identical]
    return {
        "log": log.name, "identical": report.identical, "calls": sum(report.calls.values()),
        "plans": report.calls["plan"], "steps": report.steps, "controls_caught": caught,
        "difference": str(report.difference or ""),
    }  # fmt: skip


def compare(runs: list[LiveRun], cost: CostModel, speed: str) -> dict[str, Any]:
    """Percentiles of all repeats together against those simulated, and the repeats against each other."""
    name, policy = runs[0].trace, runs[0].policy
    factors = [1.0 / (1.0 + bias(cost, run.calibration_steps())) for run in runs]
    model = [simulated(name, policy, cost, run.speeds(cost, speed)) for run in runs]
    found: dict[str, Any] = {
        "trace": name, "policy": policy, "requests": len(model[0]), "factors": [round(f, 4) for f in factors],
        "step_time_bias": [
            round((1.0 + bias(cost, recorded_steps(run.log))) * factor - 1.0, 4)
            for run, factor in zip(runs, factors, strict=True)
        ], "metrics": {},
    }  # fmt: skip
    for metric in METRICS:
        real, virtual = ([sorted(columns(t, metric)) for t in all_] for all_ in ([r.times for r in runs], model))
        found["metrics"][metric] = {f"p{p}": versus(real, virtual, p, bar) for p, bar in BARS.items()}
    return found


def versus(real: list[list[int]], virtual: list[list[int]], percent: int, bar: float) -> dict[str, Any]:
    """One percentile of all repeats together, measured and simulated."""
    measured, model = (percentile(sorted(v for values in all_ for v in values), percent) for all_ in (real, virtual))
    each = [percentile(values, percent) for values in real]
    error = model / measured - 1.0
    return {
        "measured_ns": measured, "simulated_ns": model, "error": round(error, 4), "met": abs(error) <= bar,
        "runs_ns": each, "runs_simulated_ns": [percentile(values, percent) for values in virtual],
        "spread": round((max(each) - min(each)) / statistics.mean(each), 4),
    }  # fmt: skip


def columns(times: dict[int, Times], metric: str) -> list[int]:
    return [value for entry in times.values() if (value := entry.metrics().get(metric)) is not None]


def table(row: dict[str, Any]) -> str:
    """Markdown for the docs."""
    lines = [
        "| trace | policy | metric | P50 measured | P50 simulated | error | P99 measured | P99 simulated | error |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    met = total = 0
    for found in row["rows"]:
        for metric, entry in found["metrics"].items():
            cells = [found["trace"], found["policy"], metric.upper()]
            for percent in BARS:
                value = entry[f"p{percent}"]
                met, total = met + value["met"], total + 1
                error = f"{value['error']:+.1%}" if value["met"] else f"**{value['error']:+.1%}**"
                cells += [f"{value['measured_ns'] / 1e6:.1f} ms", f"{value['simulated_ns'] / 1e6:.1f} ms", error]
            lines.append("| " + " | ".join(cells) + " |")
    shadows = row["shadow"]
    identical = sum(entry["identical"] for entry in shadows)
    caught = sum(map(sum, (entry["controls_caught"] for entry in shadows)))
    spreads = [e["spread"] for found in row["rows"] for m in found["metrics"].values() for e in m.values()]
    lines += [
        "",
        f"- {met} of {total} figures within the bars (P50 10 %, P99 20 %); outside ones in bold",
        f"- shadow test: {identical} of {len(shadows)} recorded runs replayed identically "
        f"({sum(e['calls'] for e in shadows)} calls, {sum(e['plans'] for e in shadows)} plans); "
        f"{caught} of {2 * len(shadows)} controls caught",
        f"- clock: {row['clock']}, driver: {row['driver']}, speed of the machine: {row['speed']}, "
        f"{row['repeats']} repeats, fitted on {row['fit_steps']} steps",
        f"- the live engine against itself, repeat against repeat: median {statistics.median(spreads):.1%}, "
        f"worst {max(spreads):.1%}",
        f"- others took {row['other_cores']} cores meanwhile; commit {row['commit']}, {row['date']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
