"""Vidur, in its own environment and working tree: one run, one JSON line. Standard library and Vidur only.

    cd VIDUR && python vidur_side.py TRACE.csv INSTANCES MODEL TENSOR_PARALLEL

The trace has its columns (arrived_at, num_prefill_tokens, num_decode_tokens). Its sarathi scheduler with 2,048 tokens,
linear-regression predictor, metrics on, plots and event traces off. Fitting and start-up are not counted.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    trace, instances, model, parallel = sys.argv[1:5]
    sys.path.insert(0, os.getcwd())
    os.environ["WANDB_MODE"] = "disabled"
    folder = tempfile.mkdtemp()
    flags = {
        "replica_config_device": "a100", "replica_config_network_device": "a100_dgx",
        "replica_config_model_name": model, "replica_config_tensor_parallel_size": parallel,
        "replica_config_num_pipeline_stages": 1, "cluster_config_num_replicas": instances,
        "request_generator_config_type": "trace_replay", "trace_request_generator_config_trace_file": trace,
        "trace_request_generator_config_max_tokens": 4096, "execution_time_predictor_config_type": "linear_regression",
        "replica_scheduler_config_type": "sarathi", "sarathi_scheduler_config_chunk_size": 2048,
        "sarathi_scheduler_config_batch_size_cap": 128, "global_scheduler_config_type": "round_robin",
        "metrics_config_output_dir": folder,
    }  # fmt: skip
    off = ["metrics_config_enable_chrome_trace", "metrics_config_store_plots"]
    sys.argv = ["vidur", *[word for name, value in flags.items() for word in (f"--{name}", str(value))],
                *[f"--no-{name}" for name in off]]  # fmt: skip
    from vidur.config import SimulationConfig
    from vidur.simulator import Simulator

    simulator = Simulator(SimulationConfig.create_from_cli_args())
    before, begun = time.process_time(), time.perf_counter()
    simulator.run()
    cpu_s, wall_s = time.process_time() - before, time.perf_counter() - begun
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    requests = len(Path(trace).read_text().splitlines()) - 1
    print(
        json.dumps(
            {
                "version": f"Vidur {head.stdout.strip()}, {model}",
                "requests": requests,
                "cpu_s": round(cpu_s, 3),
                "wall_s": round(wall_s, 3),
                "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        ),
        flush=True,
    )
    os._exit(0)  # it would write its metrics now


if __name__ == "__main__":
    main()
