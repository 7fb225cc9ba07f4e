"""NVIDIA Dynamo's offline replay (DynoSim), in its own environment: one run, one JSON line.

    python dynosim_side.py TRACE.jsonl INSTANCES round_robin|kv_router

The trace is in Mooncake's form. vLLM engine model with its defaults: polynomial step times.
Imports the standard library and Dynamo only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time


def main() -> None:
    trace, instances, router = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    from dynamo._core import run_mocker_trace_replay

    before, begun = os.times(), time.perf_counter()
    result = run_mocker_trace_replay([trace], num_workers=instances, router_mode=router, trace_block_size=512).summary
    after = os.times()
    print(
        json.dumps(
            {
                "version": f"ai-dynamo-runtime {importlib.metadata.version('ai-dynamo-runtime')}",
                "requests": result["completed_requests"],
                "cpu_s": round(after.user - before.user + after.system - before.system, 3),
                "wall_s": round(time.perf_counter() - begun, 3),
                "output_tokens": result["total_output_tokens"],
                "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
