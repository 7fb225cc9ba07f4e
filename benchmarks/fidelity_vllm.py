"""Measured vLLM runs against the simulator, request by request, on the measured kernels of the same device.

    python benchmarks/fidelity_vllm.py [--data ../shared/data/llmservingsim] [--tokens workload.jsonl]

Every run under `vllm_measured/` is replayed: its arrivals (the client's clock) and token counts through the simulator,
with the real scheduler under vLLM's options and a KernelTable over `kernel_profiles/` of the same name. Host time a
step is calibrated on the first 100 requests of one run and reported on other runs, and on the rest of that one.

The data has no token ids. A request finds its own blocks again after a preemption, but not those of others. With
`--tokens` (LLMServingSim's workload file, JSON lines with `input_tok_ids`) prompts share what they really shared.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import Ledger

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost.kernel_profile import read_profile
from megalith.cost.kernel_table import KernelTable
from megalith.cost.timer import StepTimer
from megalith.policy import registry
from megalith.policy.batching import SplitFuse
from megalith.policy.cluster import InstanceId
from megalith.policy.facts import Request
from megalith.policy.hashing import block_hashes
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.cluster import Cluster
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.specs import catalog
from megalith.specs.fleet import LinkSpec, PolicySpec, PoolSpec
from megalith.specs.model import ModelSpec

_read_profile = functools.cache(read_profile)
DATA = Path(__file__).resolve().parents[1] / "../shared/data/llmservingsim"
CALIBRATION_REQUESTS = 100
HOST_LIMIT_NS = 5_000_000


@dataclass(frozen=True)
class Measured:
    """One request as vLLM served it; seconds on one clock."""

    number: int
    input_tokens: int
    output_tokens: int
    arrival_s: float
    first_s: float
    last_s: float


@dataclass(frozen=True)
class VllmRun:
    """One measured run with what it takes to replay it."""

    name: str
    requests: tuple[Measured, ...]
    model: ModelSpec
    tensor_parallel: int
    max_sequences: int
    token_budget: int
    block_tokens: int
    kv_blocks: int
    link: LinkSpec | None
    profile: Path

    def timer(self, host_ns: int) -> KernelTable:
        """The kernel table of the same device and model."""
        profile = _read_profile(self.profile, self.tensor_parallel)
        return KernelTable(profile, self.model, self.tensor_parallel, host_ns, self.link)


def read_run(data: Path, name: str) -> VllmRun:
    """`vllm_measured/<name>` with `kernel_profiles/<name>`. Raises ConfigError on a run that is not replayed."""
    folder = data / "vllm_measured" / name
    meta = json.loads((folder / "meta.json").read_text())
    engine = meta["engine_kwargs"]
    if engine.get("data_parallel_size", 1) != 1:
        raise ConfigError(f"{name} is data parallel over {engine['data_parallel_size']} engines in lockstep.")
    with (folder / "requests.csv").open(newline="") as lines:
        requests = tuple(
            Measured(
                int(row["request_id"].rpartition("-")[2]), int(row["input_tokens"]), int(row["output_tokens"]),
                float(row["arrival_s"]), float(row["first_token_s"]), float(row["last_token_s"]),
            )
            for row in csv.DictReader(lines)
        )  # fmt: skip
    kv = meta.get("kv_cache") or {}
    block_tokens = kv.get("block_size") or 16
    # One of vLLM's blocks is its null block. Where none are recorded, the cache was far from full.
    recorded = kv.get("num_gpu_blocks")
    enough = sum(-(-(one.input_tokens + one.output_tokens) // block_tokens) for one in requests)
    link = None
    if engine["tensor_parallel_size"] > 1:
        cluster = json.loads((folder / "llmservingsim_cluster_config.json").read_text())
        bandwidth, latency = (_first(cluster[key]) for key in ("link_bw", "link_latency"))
        link = LinkSpec(bytes_per_s=bandwidth * 1e9, latency_s=latency * 1e-9)
    return VllmRun(
        name=name,
        requests=requests,
        model=_model(meta.get("model") or name.partition("_")[2]),
        tensor_parallel=engine["tensor_parallel_size"],
        max_sequences=engine["max_num_seqs"],
        token_budget=engine["max_num_batched_tokens"],
        block_tokens=block_tokens,
        kv_blocks=recorded - 1 if recorded else enough,
        link=link,
        profile=data / "kernel_profiles" / name,
    )


def _first(value: Any) -> float:
    """A figure of LLMServingSim's network: one for all dimensions, or one for each; the first joins the ranks."""
    return float(value[0] if isinstance(value, list) else value)


def _model(name: str) -> ModelSpec:
    """The catalogue's model of that name, without the maker, or of a shorter one when it has a suffix."""
    wanted = name.rpartition("/")[2].lower()
    while catalog.find_model(wanted) is None and "-" in wanted:
        wanted = wanted.rpartition("-")[0]
    return catalog.model(wanted)


def prefix_hashes(run: VllmRun, tokens: Path | None = None) -> dict[int, tuple[int, ...]]:
    """A hash for each full prompt block: of its tokens when they are known, else one that nobody else has."""
    if tokens is None:
        return {
            one.number: tuple((one.number << 32) + block for block in range(one.input_tokens // run.block_tokens))
            for one in run.requests
        }
    with tokens.open() as lines:
        return {number: block_hashes(json.loads(line)["input_tok_ids"], run.block_tokens)
                for number, line in enumerate(lines)}  # fmt: skip


def scheduler(run: VllmRun) -> Scheduler:
    """The real scheduler as vLLM 0.19 schedules: chunked prefill after all decodes, no watermark, prefix cache on."""
    kv = KvAccount(run.kv_blocks, run.block_tokens)
    return Scheduler(SplitFuse(run.token_budget), kv, Limits(max_sequences=run.max_sequences, max_waiting=1_000_000))


def arrivals(run: VllmRun, tokens: Path | None = None) -> list[Live]:
    """The requests in order of arrival."""
    hashes = prefix_hashes(run, tokens)
    ordered = sorted(run.requests, key=lambda one: (one.arrival_s, one.number))
    return [
        Live(
            Request(one.number, round(one.arrival_s * NS_PER_S), one.input_tokens, one.output_tokens, 0,
                    hashes[one.number]),
            one.output_tokens,
        )
        for one in ordered
    ]  # fmt: skip


def replay(run: VllmRun, timer: StepTimer, tokens: Path | None = None, leap: bool = True) -> dict[int, Live]:
    """The run in the simulator: what became of each request, by number."""

    def make(instance_id: InstanceId, _pool: PoolSpec, cluster: Cluster) -> Instance:
        return Instance(instance_id, cluster.kernel, scheduler(run), timer, cluster, leap)

    kernel, ledger = Kernel(), Ledger()
    cluster = Cluster(kernel, registry.router(PolicySpec(name="round-robin"), 0), (), ledger, make)
    cluster.add_instance(PoolSpec(name="vllm", device=run.name, count=1))
    cluster.feed(iter(arrivals(run, tokens)))
    cluster.control.start()
    kernel.run()
    return ledger.ended


def decode_bias(run: VllmRun, lives: dict[int, Live], numbers: Iterable[int]) -> float:
    """Simulated over measured time from first to last token, of these requests together, less 1."""
    chosen = set(numbers)
    measured = sum(one.last_s - one.first_s for one in run.requests if one.number in chosen)
    simulated = sum(live.finish_ns - live.first_ns for live in lives.values() if live.request.id in chosen)
    return simulated / NS_PER_S / measured - 1.0


def calibrate(run: VllmRun, numbers: Sequence[int], tokens: Path | None = None, precision_ns: int = 20_000) -> int:
    """Host time a step, in nanoseconds, with which these requests decode as fast as they did; at least 0."""

    def bias(host_ns: int) -> float:
        return decode_bias(run, replay(run, run.timer(host_ns), tokens), numbers)

    low, high = 0, HOST_LIMIT_NS
    if bias(low) >= 0.0:
        return 0
    while high - low > precision_ns:
        middle = (low + high) // 2
        if bias(middle) < 0.0:
            low = middle
        else:
            high = middle
    return round((low + high) // 2, -4)


def first_requests(run: VllmRun, count: int = CALIBRATION_REQUESTS) -> list[int]:
    """Numbers of those that arrived first."""
    return [live.request.id for live in arrivals(run)[:count]]


@dataclass(frozen=True)
class Errors:
    """Simulated against measured over a set of requests; fractions. TTFT and E2E count from arrival."""

    e2e_mean: float
    """Of each request, without sign."""
    e2e_median: float
    e2e_p90: float
    bias_ttft: float
    """Of the mean over requests, with sign, as the next two."""
    bias_tpot: float
    bias_e2e: float


def errors(pairs: Sequence[tuple[Measured, float, float]]) -> Errors:
    """From (measured, simulated TTFT, simulated E2E), in seconds."""
    e2e = [abs(last / (one.last_s - one.arrival_s) - 1.0) for one, _, last in pairs]
    real = [(one, one.first_s - one.arrival_s, one.last_s - one.arrival_s) for one, _, _ in pairs]
    means, measured = _means(pairs), _means(real)
    ttft, tpot, end = (ours / theirs - 1.0 for ours, theirs in zip(means, measured, strict=True))
    p90 = sorted(e2e)[int(0.9 * len(e2e))]
    return Errors(statistics.fmean(e2e), statistics.median(e2e), p90, ttft, tpot, end)


def _means(pairs: Sequence[tuple[Measured, float, float]]) -> tuple[float, float, float]:
    """TTFT, TPOT and E2E."""
    tpot = [(last - first) / max(1, one.output_tokens - 1) for one, first, last in pairs]
    return (
        statistics.fmean(first for _, first, _ in pairs),
        statistics.fmean(tpot),
        statistics.fmean(last for _, _, last in pairs),
    )


def simulated_errors(run: VllmRun, lives: dict[int, Live], numbers: Iterable[int] | None = None) -> Errors:
    """Of our replay, for these requests or all."""
    chosen = {one.number for one in run.requests} if numbers is None else set(numbers)
    pairs = []
    for one in run.requests:
        if one.number in chosen:
            live = lives[one.number]
            arrival_ns = live.request.arrival_ns
            pairs.append((one, (live.first_ns - arrival_ns) / NS_PER_S, (live.finish_ns - arrival_ns) / NS_PER_S))
    return errors(pairs)


def llmservingsim_errors(data: Path, run: VllmRun) -> Errors:
    """Of LLMServingSim's own prediction of this run."""
    by_number = {one.number: one for one in run.requests}
    path = data / "vllm_measured" / run.name / "llmservingsim_output.csv.gz"
    with gzip.open(path, "rt", newline="") as lines:
        return errors([
            (by_number[int(row["request id"])], int(row["TTFT"]) / NS_PER_S, int(row["latency"]) / NS_PER_S)
            for row in csv.DictReader(lines)
        ])  # fmt: skip


def main() -> None:
    """Print the table of docs/fidelity.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--tokens", type=Path, help="workload with token ids, for the prefixes that prompts share")
    parser.add_argument("--host-us", type=float, help="report with this host time a step instead of calibrating")
    options = parser.parse_args()
    runs = []
    for folder in sorted((options.data / "vllm_measured").iterdir()):
        try:
            runs.append(read_run(options.data, folder.name))
        except ConfigError as error:
            print(f"{folder.name} is passed over: {error}")
    rows: list[tuple[str, ...]] = []
    if options.host_us is None:
        sources = [(run, calibrate(run, first_requests(run), options.tokens)) for run in runs]
    else:
        sources = [(None, round(options.host_us * 1000))]
    for run in runs:
        for source, host_ns in sources:
            lives = replay(run, run.timer(host_ns), options.tokens)
            rest = {one.number for one in run.requests}
            if source is run:
                rest -= set(first_requests(run))
            origin = "given" if source is None else f"{source.name}, first {CALIBRATION_REQUESTS}"
            figures = simulated_errors(run, lives, rest)
            preempted = sum(live.preemptions for live in lives.values())
            rows.append(
                (run.name, f"{origin}: {host_ns / 1e6:.2f} ms", str(len(rest)), *_cells(figures), str(preempted))
            )
        rows.append(
            (run.name, "LLMServingSim", str(len(run.requests)), *_cells(llmservingsim_errors(options.data, run)), "")
        )
    head = ("run", "host time a step from", "requests", "E2E each: mean", "median", "p90", "TTFT mean", "TPOT mean",
            "E2E mean", "preemptions")  # fmt: skip
    for cells in (head, tuple("---" for _ in head), *rows):
        print("| " + " | ".join(cells) + " |")


def _cells(figures: Errors) -> list[str]:
    each = [f"{100 * value:.2f} %" for value in (figures.e2e_mean, figures.e2e_median, figures.e2e_p90)]
    return each + [f"{100 * value:+.1f} %" for value in (figures.bias_ttft, figures.bias_tpot, figures.bias_e2e)]


if __name__ == "__main__":
    main()
