"""Megalith beside Vidur on equal input: its operator times, its trace, its replicas; request by request.

    python benchmarks/fidelity_vidur.py --data ../shared/data/vidur

Prints the table of docs/fidelity.md. Both columns are simulated. Nothing is fitted to Vidur's results: the step times
are its polynomials over its measured operators, the rest is what its configuration says.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from side_by_side import Ledger, Times, equal_share, head, line, percentiles, read_rows

from megalith.cost.timer_vidur import vidur
from megalith.policy import registry
from megalith.policy.batching import by_name
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.pipelined import PipelinedScheduler
from megalith.policy.scheduler import Limits
from megalith.sim.cluster import Cluster
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.sim.pipelined import PipelinedInstance
from megalith.specs.fleet import PolicySpec, PoolSpec

GIB = 1 << 30
BLOCK_TOKENS, MAX_TOKENS, BATCH_CAP = 16, 4096, 128
WATERMARK = 0.01


class Run(NamedTuple):
    """One run of Vidur."""

    policy: str
    """Batch policy here."""
    budget: int
    replicas: int = 4
    stages: int = 2
    model: str = "llama-2-70b/a100-80gb/a100_dgx/tp2"


RUNS = {
    "vllm": Run("prefill-first-padded", 4096),
    "sarathi": Run("splitfuse", 512),
}
OUTPUT = "output_llama2-70b_a100_tp2pp2_4replicas_{}.csv.gz"


def kv_blocks(stages: int) -> int:
    """What Vidur's memory planner gives a replica of Llama-2-70B in tensor parallel 2 on devices of 80 GiB.

    It counts the KV of all layers on each device, whatever the stages, and a request as 4,096 tokens.
    """
    hidden, head_dim, heads, kv_heads, mlp, layers, parallel = 8192, 128, 64, 8, 28_672, 80, 2
    attention = hidden * head_dim * (2 * heads // parallel + 2 * kv_heads // parallel)
    weights = 2 * (attention + 3 * hidden * mlp // parallel) * (layers // stages)
    request = 2 * 2 * head_dim * (kv_heads // parallel) * MAX_TOKENS * layers
    slots = int((80 * GIB * 0.9 - weights) // request) * stages
    return slots * (MAX_TOKENS // BLOCK_TOKENS)


def arrivals(trace: Iterable[dict[str, str]]) -> Iterator[Live]:
    """Prompts are cut so that prompt and answer fit the context, as Vidur does."""
    for number, row in enumerate(trace):
        output = max(1, int(row["num_decode_tokens"]))
        prompt = min(max(1, int(row["num_prefill_tokens"])), MAX_TOKENS - output)
        yield Live(Request(number, round(float(row["arrived_at"]) * 1e9), prompt, output), output)


def simulate(run: Run, trace: list[dict[str, str]]) -> dict[int, Times]:
    """Our side: cluster, router and scheduler as they ship."""
    kernel, ledger = Kernel(), Ledger()
    blocks = kv_blocks(run.stages)
    timer = vidur(run.model).timer(run.stages)

    def make(instance_id: int, _pool: PoolSpec, cluster: Cluster) -> Instance:
        kv = KvAccount(blocks, BLOCK_TOKENS, 0, prefix_cache=False, watermark_blocks=int(WATERMARK * blocks))
        limits = Limits(max_sequences=BATCH_CAP, max_waiting=1 << 20)
        scheduler = PipelinedScheduler(by_name(run.policy, run.budget), kv, limits, run.stages)
        return PipelinedInstance(instance_id, kernel, scheduler, timer, cluster)

    cluster = Cluster(kernel, registry.router(PolicySpec(name="round-robin"), 0), [], ledger, make)
    for _ in range(run.replicas):
        cluster.add_instance(PoolSpec(name="replicas", device="a100-80gb", count=run.replicas))
    cluster.feed(arrivals(trace))
    cluster.control.start()
    kernel.run()
    for instance in cluster.instances.values():
        instance.scheduler.check_integrity()
    return {number: times(live) for number, live in sorted(ledger.ended.items())}


def times(live: Live) -> Times:
    arrived_ns, tokens = live.request.arrival_ns, live.output_tokens
    return {
        "wait": (live.scheduled_ns - arrived_ns) / 1e9,
        "ttft": (live.first_ns - arrived_ns) / 1e9,
        "tbt": (live.finish_ns - live.first_ns) / 1e9 / max(1, tokens - 1),
        "e2e": (live.finish_ns - arrived_ns) / 1e9,
    }


def theirs(table: Iterable[dict[str, str]]) -> dict[int, Times]:
    result = {}
    for row in table:
        wait, ttft, e2e = [
            float(row[name]) for name in ("request_scheduling_delay", "prefill_e2e_time", "request_e2e_time")
        ]
        tokens = int(float(row["request_num_decode_tokens"]))
        result[int(row["Request Id"])] = {
            "wait": wait,
            "ttft": ttft,
            "tbt": (e2e - ttft) / max(1, tokens - 1),
            "e2e": e2e,
        }
    return result


def compare(name: str, data: Path) -> Iterator[str]:
    """The lines of one run."""
    begun = time.process_time()
    ours = simulate(RUNS[name], read_rows(data / "input_splitwise_conv_first1000.csv.gz"))
    spent = time.process_time() - begun
    other = theirs(read_rows(data / OUTPUT.format(name)))
    for metric in ("ttft", "tbt", "e2e"):
        met = equal_share(ours, other, metric)
        yield line(name, metric.upper(), percentiles(ours, metric), percentiles(other, metric), met)
    print(f"{name}: {len(ours)} requests, {spent:.1f} CPU s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    arguments = parser.parse_args()
    print("\n".join(head()))
    for name in arguments.runs:
        for text in compare(name, arguments.data):
            print(text, flush=True)


if __name__ == "__main__":
    main()
