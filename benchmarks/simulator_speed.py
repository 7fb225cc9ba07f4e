"""How fast the simulator is and what memory it takes: one history row a case, each in a process of its own on one core.

    python benchmarks/simulator_speed.py --data ../shared/data/traces
    python benchmarks/simulator_speed.py --data ../shared/data/traces --cases azure-4 fleet-100k --repeats 1
    MEGALITH_PURE_PYTHON=1 python benchmarks/simulator_speed.py --data ../shared/data/traces
    python benchmarks/simulator_speed.py --report

Everything is on: router, recorder, samples of all instances, service level, hash of all decisions. CPU seconds are user
and system time from the first request that is read from the trace to the report's figures; start-up and making the
fleet are told apart. `calibration` is the time of one turn of `for i in range(n): x += i & 3`, taken before and after
each run: figures of different machines, or of one that is busy, compare better in units of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import history
import machine

from megalith.base import compiled
from megalith.sim.run import Run
from megalith.sim.scenario import Scenario
from megalith.specs.fleet import FleetSpec, LinkSpec, PolicySpec, PoolSpec
from megalith.specs.slo import parse_slo
from megalith.specs.workload_text import parse_workload

TIMEOUT_S = 1800
AZURE, MOONCAKE = "azure2023_conv.csv.gz", "mooncake_fast25_conversation.jsonl.gz"
FLEET_RATE = 5000
"""Requests a second for 1,250 instances of eight devices: four a second on each."""


class Case(NamedTuple):
    """One run. `workload`: a trace in the data folder, or the words of a drawn one."""

    about: str
    workload: str
    instances: int
    router: str
    wanted: float
    """Requests a CPU second."""
    block_tokens: int = 16
    prefix_cache: bool = False
    tensor_parallel: int = 1


def _azure(instances: int) -> Case:
    return Case("Azure conversation hour", AZURE, instances, "least-outstanding", 30_000)


def _mooncake(router: str) -> Case:
    return Case("Mooncake conversation, prefix cache", MOONCAKE, 16, router, 5_000, 512, True)


def _fleet(requests: int) -> Case:
    words = f"azure-conv:rate={FLEET_RATE},requests={requests}"
    return Case(f"{requests:,} requests on 10,000 devices", words, 1250, "power-of-two", 3_334, tensor_parallel=8)


CASES = {
    **{f"azure-{count}": _azure(count) for count in (1, 4, 16, 64)},
    "mooncake-16-round-robin": _mooncake("round-robin"),
    "mooncake-16-prefix-aware": _mooncake("prefix-aware"),
    "fleet-100k": _fleet(100_000),
    "fleet-1m": _fleet(1_000_000),
}


def scenario(case: Case, data: Path | None) -> Scenario:
    """What a case runs. Raises ConfigError for a trace that is not there."""
    recorded = case.workload.endswith(".gz")
    pool = PoolSpec(
        name="all", device="h100-sxm", count=case.instances, block_tokens=case.block_tokens,
        prefix_cache=case.prefix_cache, tensor_parallel=case.tensor_parallel,
    )  # fmt: skip
    return Scenario(
        model="llama-3.1-8b",
        fleet=FleetSpec(pools=(pool,), router=PolicySpec(name=case.router), link=LinkSpec(bytes_per_s=50e9)),
        workload=parse_workload(str((data or Path()) / case.workload) if recorded else case.workload),
        slo=parse_slo("ttft=500ms,tpot=50ms,attain=0.9"),
    )


def calibration_ns() -> float:
    """One turn of an empty-ish loop, the best of five."""
    best = 1.0
    for _ in range(5):
        begun, x = time.process_time(), 0
        for i in range(200_000):
            x += i & 3
        best = min(best, (time.process_time() - begun) / 200_000)
    return best * 1e9


def measure(case: Case, data: Path | None) -> dict[str, Any]:
    """One run in this process."""
    before_ns = calibration_ns()
    begun_s = time.process_time()
    run = Run(scenario(case, data))
    made_s = time.process_time()
    most_live = 0
    while run.advance(5_000):
        most_live = max(most_live, run.progress.live)
    result = run.result()
    cpu_s = time.process_time() - made_s
    return {
        "requests": result.requests, "cpu_s": round(cpu_s, 3), "setup_s": round(made_s - begun_s, 3),
        "requests_cpu_s": round(result.requests / cpu_s, 1), "events": result.events, "most_live": most_live,
        "simulated_s": round(result.end_ns / 1e9, 1), "digest": result.digest, "timing": result.timing["all"],
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "calibration_ns": round((before_ns + calibration_ns()) / 2, 1),
    }  # fmt: skip


def fresh(name: str, data: Path | None, core: int) -> dict[str, Any]:
    """One run in a process of its own. Raises RuntimeError with the end of what it said when it fails."""
    words = [sys.executable, str(Path(__file__).resolve()), "--run", name, *(["--data", str(data)] if data else [])]
    load = machine.Load()
    done = subprocess.run(
        [*machine.pinned((core,)), *words], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-800:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**row, "other_cores": round(load.other_cores(row["cpu_s"]), 2)}


def best_of(name: str, data: Path | None, core: int, repeats: int) -> dict[str, Any]:
    """The run with the least CPU time of several, which must have decided the same; and the range of all."""
    rows = [fresh(name, data, core) for _ in range(repeats)]
    if len({row["digest"] for row in rows}) != 1:
        raise RuntimeError(f"{name}: the same scenario gave several digests: {sorted({r['digest'] for r in rows})}")
    rates = [row["requests_cpu_s"] for row in rows]
    return {
        **min(rows, key=lambda row: row["cpu_s"]),
        "runs": repeats,
        "requests_cpu_s_spread": [min(rates), max(rates)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the recorded traces; without it only drawn cases run")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="of each case, but for those of 10,000 devices")
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--run", choices=list(CASES), help="one case in this process, as JSON")
    parser.add_argument("--report", action="store_true", help="only write RESULTS.md again")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(CASES[options.run], options.data)))
        return
    stamp = {"commit": machine.commit(), "machine": machine.describe()}
    for name in [] if options.report else options.cases:
        case = CASES[name]
        if case.workload.endswith(".gz") and options.data is None:
            print(name, "needs --data", flush=True)
            continue
        repeats = 1 if name.startswith("fleet") else options.repeats
        row = best_of(name, options.data, options.core, repeats)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        arm = "compiled" if compiled.active() else "plain Python"
        if "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")):
            arm += ", optimised CPython"
        head = {"date": date, **stamp, "kind": "simulator-speed", "case": name, "arm": arm, "about": case.about}
        history.append([{**head, "instances": case.instances, "router": case.router, "wanted": case.wanted, **row}])
        print(
            f"{name}: {row['requests_cpu_s']:,.0f} requests a CPU second (wanted {case.wanted:,.0f}), "
            f"{row['cpu_s']:.2f} s + {row['setup_s']:.2f} s set-up, {row['rss_mib']} MiB, at most {row['most_live']:,} "
            f"live, calibration {row['calibration_ns']:.0f} ns, others {row['other_cores']:.2f} cores",
            flush=True,
        )
    history.write_results()


if __name__ == "__main__":
    main()
