"""Our side of simulator_peers.py: one run of the simulator in a process of its own, one JSON line."""

from __future__ import annotations

import json
import resource
import sys
import time

import msgspec

import megalith
from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from megalith.specs.slo import parse_slo
from megalith.specs.workload_text import parse_workload


def main() -> None:
    trace, instances, router = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    pool = PoolSpec(name="all", device="h100-sxm", count=instances, block_tokens=int(sys.argv[4]))
    scenario = Scenario(
        model="llama-3.1-8b",
        fleet=FleetSpec(pools=(pool,), router=PolicySpec(name=router)),
        workload=parse_workload(trace),
        slo=parse_slo("ttft=500ms,tpot=50ms"),
    )
    begun, wall = time.process_time(), time.perf_counter()
    result = simulate(scenario)
    cpu_s, wall_s = time.process_time() - begun, time.perf_counter() - wall
    print(
        json.dumps(
            {
                "version": f"megalith {megalith.__version__}",
                "requests": result.requests,
                "cpu_s": round(cpu_s, 3),
                "wall_s": round(wall_s, 3),
                "events": result.events,
                "timing": result.timing["all"],
                "digest": result.digest,
                "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "scenario": msgspec.to_builtins(scenario.fleet.router),
            }
        )
    )


if __name__ == "__main__":
    main()
