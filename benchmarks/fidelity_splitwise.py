"""Megalith beside splitwise-sim on equal input: its step times, its traces, its clusters; request by request.

    python benchmarks/fidelity_splitwise.py --data ../shared/data/splitwise-sim [--runs bl70_2 hh70_2 ...]

Prints the tables of docs/fidelity.md. Both columns are simulated. Nothing is fitted: the step times are the medians of
its performance data, the rest is what its configuration says.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from side_by_side import SHARES, Ledger, Times, equal_share, head, line, percentiles, read_rows

from megalith.cost.timer_splitwise import splitwise
from megalith.policy import registry
from megalith.policy.batching import by_name
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.cluster import Cluster
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.sim.network import Network
from megalith.sim.parties import KvShape
from megalith.sim.transfer import Handoffs
from megalith.specs.fleet import HandoffSpec, LinkSpec, PolicySpec, PoolSpec

GIB = 1 << 30
BLOCK_TOKENS = 16


class Shape(NamedTuple):
    """What splitwise-sim's configuration says of a model; its KV has as many heads as its attention."""

    layers: int
    hidden: int
    weight_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.hidden

    @property
    def kv_blocks(self) -> int:
        return (8 * 80 * GIB - self.weight_bytes) // (self.kv_bytes_per_token * BLOCK_TOKENS)


SHAPES = {"llama2-70b": Shape(80, 8192, 135_000_000_000), "bloom-176b": Shape(70, 14_336, 329_000_000_000)}


class Run(NamedTuple):
    """One run: a model, a trace, and how many machines of which kind do what."""

    model: str
    trace: str
    prompt: tuple[str, int]
    """Kind and number of the machines for prompts; of all of them in a baseline."""
    token: tuple[str, int] | None = None


H100, A100 = "h100-80gb", "a100-80gb"
RUNS = {
    "bl70_2": Run("llama2-70b", "rr_conv_2_60s", (H100, 1)),
    "hh70_2": Run("llama2-70b", "rr_conv_2_60s", (H100, 1), (H100, 1)),
    "ha70_2": Run("llama2-70b", "rr_conv_2_60s", (H100, 1), (A100, 1)),
    "L_bl_conv70": Run("llama2-70b", "rr_conv_70_120s", (H100, 40)),
    "L_hh_conv70": Run("llama2-70b", "rr_conv_70_120s", (H100, 25), (H100, 15)),
    "B_bl_conv70": Run("bloom-176b", "rr_conv_70_120s", (H100, 40)),
    "B_hh_conv70": Run("bloom-176b", "rr_conv_70_120s", (H100, 25), (H100, 15)),
    "S_bl_130": Run("llama2-70b", "rr_conv_130_60s", (H100, 40)),
    "S_hh_130": Run("llama2-70b", "rr_conv_130_60s", (H100, 25), (H100, 15)),
}


def arrivals(trace: Iterable[dict[str, str]]) -> Iterator[Live]:
    """splitwise-sim knows how long each answer gets and reserves as much, so this is what max_new_tokens says."""
    for row in trace:
        output = int(row["token_size"])
        at_ns = round(float(row["arrival_timestamp"]) * 1e9)
        yield Live(Request(int(row["request_id"]), at_ns, int(row["prompt_size"]), output), output)


def simulate(run: Run, trace: list[dict[str, str]], batching: str = "splitwise") -> dict[int, Times]:
    """Our side: cluster, router, hand-off and scheduler as they ship."""
    shape = SHAPES[run.model]
    kernel, ledger = Kernel(), Ledger()

    def make(instance_id: int, pool: PoolSpec, cluster: Cluster) -> Instance:
        timer = splitwise(f"{run.model}/{pool.device}/tp8").timer("artifact")
        kv = KvAccount(shape.kv_blocks, BLOCK_TOKENS, prefix_cache=False)
        limits = Limits(max_sequences=512, max_waiting=1 << 20)
        return Instance(instance_id, kernel, Scheduler(by_name(batching, 2048), kv, limits), timer, cluster)

    if run.token is None:
        router = PolicySpec(name="least-tokens")
        pools = [PoolSpec(name="all", device=run.prompt[0], count=run.prompt[1])]
    else:
        router = PolicySpec(name="splitwise", options={"transfer": "push"})
        pools = [
            PoolSpec(name="prompt", device=run.prompt[0], count=run.prompt[1], role="prefill"),
            PoolSpec(name="token", device=run.token[0], count=run.token[1], role="decode"),
        ]
    cluster = Cluster(kernel, registry.router(router, 0), [], ledger, make)
    link = LinkSpec(bytes_per_s=200.0 * GIB, contention=False)
    spec = HandoffSpec(whole_blocks=False)
    cluster.handoffs = Handoffs(cluster, Network(kernel, link), spec, KvShape(shape.kv_bytes_per_token, shape.layers))
    for pool in pools:
        for _ in range(pool.count):
            cluster.add_instance(pool)
    cluster.feed(arrivals(trace))
    cluster.control.start()
    kernel.run()
    return {number: times(live) for number, live in sorted(ledger.ended.items())}


def times(live: Live) -> Times:
    """As splitwise-sim counts: the time between tokens is over all tokens, the first one included."""
    ttft = (live.first_ns - live.request.arrival_ns) / 1e9
    e2e = (live.finish_ns - live.request.arrival_ns) / 1e9
    return {"ttft": ttft, "tbt": (e2e - ttft) / live.output_tokens, "e2e": e2e}


def theirs(table: Iterable[dict[str, str]]) -> dict[int, Times]:
    names = {"ttft": "ttft_times", "tbt": "tbt_times", "e2e": "response_times"}
    return {
        int(float(row["request_ids"])): {metric: float(row[name]) for metric, name in names.items()} for row in table
    }


def compare(name: str, data: Path, batching: str = "splitwise") -> Iterator[str]:
    """The lines of one run."""
    run = RUNS[name]
    begun = time.process_time()
    ours = simulate(run, read_rows(data / "inputs" / f"{run.trace}.csv.gz"), batching)
    spent = time.process_time() - begun
    path = data / "outputs" / f"{name}.csv.gz"
    kept = theirs(read_rows(path)) if path.exists() else None
    (row,) = [row for row in read_rows(data / "summary.csv") if row["run"] == name]
    for metric in ("ttft", "tbt", "e2e"):
        if kept is None:
            other, met = [float(row[f"{metric}_p{round(100 * share)}_s"]) for share in SHARES], None
        else:
            other, met = percentiles(kept, metric), equal_share(ours, kept, metric)
        yield line(name, metric.upper(), percentiles(ours, metric), other, met)
    print(f"{name}: {len(ours)} requests, {spent:.1f} CPU s here, {row['sim_cpu_s']} s theirs", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    parser.add_argument("--batching", default="splitwise", help="another batch policy, to see what it is worth")
    arguments = parser.parse_args()
    print("\n".join(head()))
    for name in arguments.runs:
        for text in compare(name, arguments.data, arguments.batching):
            print(text, flush=True)


if __name__ == "__main__":
    main()
