"""The gate of the step timers: published GPU runs, replayed at their fixed concurrency through the real scheduler.

    python benchmarks/fidelity_silicon.py [--data ../shared/data/calibration] [--rows] [--every 1]

The runs are rows of silicon_e2e.parquet (aiconfigurator-core 0.12.0, Apache-2.0). Nothing is fitted to them: the timers
are composed of single operators (fit_operators.py), engine options are those of the published scripts or the engines'
defaults (see `engine_of`). All times that this program computes are simulated.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import duckdb
from closed_loop import NO_WAIT, Client, ClosedLoop, Wait

from megalith.base.errors import MegalithError
from megalith.base.random import uniform
from megalith.cost.memory import (
    RESIDENCY,
    Workspace,
    activation_bytes,
    kv_bytes_per_token,
    per_device_kv_heads,
    per_device_weights,
    weight_bytes,
)
from megalith.cost.operators import VLLM, tables
from megalith.cost.timer_operators import OperatorTimer
from megalith.policy.batching import Admission, BatchFacts, BatchPolicy, PrefillFirst, SplitFuse, StepShape
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.specs import catalog
from megalith.specs.model import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "calibration"
PS_PER_MS = 1_000_000_000
BLOCK_TOKENS = 16
BARS = 0.15, 0.35, 0.30
"""TPOT median and nine in ten, TTFT median."""
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
}
DEVICES = {"h100_sxm": "h100-sxm", "b200_sxm": "b200", "h200_sxm": "h200", "a100_sxm": "a100-80gb", "l40s": "l40s"}


@dataclass(frozen=True)
class Run:
    """One published run."""

    key: str
    model: str
    device: str
    backend: str
    version: str
    precision: str
    tensor_parallel: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    inference_max: bool
    """Of the InferenceMAX benchmark; otherwise of NVIDIA's own, made with genai-perf."""
    ttft_ms: float
    tpot_ms: float

    @property
    def number(self) -> str:
        """The number type of the tables: a run without a precision is in the type of the checkpoint, bf16."""
        return {"": "bf16", "fp8": "fp8", "fp4": "mxfp4"}[self.precision]


@dataclass(frozen=True)
class Engine:
    """How the engine of a run was set up."""

    policy: BatchPolicy
    memory_share: float
    """Of the device for weights, activations and KV."""
    host_ns: int
    """0: the engine plans and prepares a step while the one before runs."""
    kv: str
    kernels: str = VLLM
    whole_reservation: bool = False
    """KV for prompt and whole output is set aside at admission (TensorRT-LLM's guaranteed_no_evict)."""
    wait: Wait = NO_WAIT


class InFlight:
    """All decodes and as many whole prompts as the budget allows: TensorRT-LLM without chunked context."""

    name: ClassVar[str] = "in-flight"

    def __init__(self, token_budget: int) -> None:
        self.constant = StepShape(token_budget, mixed=True, split=False, admission=Admission.BUDGET)

    def shape(self, facts: BatchFacts) -> StepShape:  # noqa: ARG002 - the same shape for every fact
        return self.constant


def engine_of(run: Run) -> Engine:
    """The engine's options, none of them tuned.

    InferenceMAX (its benchmark scripts at the date of the runs): see `inference_max`.
    NVIDIA's own runs: the rules of aiconfigurator's generator (benchmark/trtllm.rule, benchmark/vllm.rule), else the
    engines' defaults. TensorRT-LLM and vLLM: at most concurrency + prompt + 1,500 tokens a step. TensorRT-LLM: no
    chunked context, 80 % of what weights leave, overlap scheduler, FP8 KV beside FP8 weights, which are scaled in
    blocks (its evaluation tool of that version serves Qwen/Qwen3-32B-FP8). vLLM 0.12: 90 % of memory and no
    asynchronous scheduling, so 0.65 ms of host time a step (docs/fidelity.md, another GPU). SGLang: prompts first,
    8,192 tokens, 0.87 of memory, overlap scheduler.
    """
    if run.inference_max:
        return inference_max(run)
    if run.backend == "sglang":
        return Engine(PrefillFirst(8_192), 0.87, 0, "bf16", "sglang")
    budget = run.concurrency + run.prompt_tokens + 1_500
    if run.backend == "vllm":
        return Engine(SplitFuse(budget), 0.9, 650_000, "bf16")
    if run.number == "fp8":
        return Engine(InFlight(budget), 0.8, 0, "fp8", "trtllm-block", True)
    return Engine(InFlight(budget), 0.8, 0, "bf16", "trtllm", True)


def inference_max(run: Run) -> Engine:
    """InferenceMAX's scripts, at its commits 8510c0a (Llama, October 2025) and those of the dates of gpt-oss.

    vLLM: 8,192 batched tokens, asynchronous scheduling, 90 % of memory; FP8 KV for Llama, and for gpt-oss on B200 since
    it names a version; experts of gpt-oss by Marlin on H100 (VLLM_MXFP4_USE_MARLIN) and by FlashInfer with mxfp8 inputs
    on B200 (VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8). TensorRT-LLM: FP8 KV; Llama with 16,384 tokens, 90 % of what weights
    leave and, for 1,024 / 1,024 below eight devices, batch_wait_max_tokens_ratio 0.9 and batch_wait_timeout_iters 20;
    gpt-oss with 20,000 tokens and 85 %.
    """
    experts = run.model == "gpt-oss-120b"
    if run.backend == "vllm":
        if not experts:
            return Engine(SplitFuse(8_192), 0.9, 0, "fp8")
        if run.device == "h100-sxm":
            return Engine(SplitFuse(8_192), 0.9, 0, "bf16", "marlin")
        return Engine(SplitFuse(8_192), 0.9, 0, "fp8" if run.version else "bf16", "mxfp8")
    if experts:
        return Engine(InFlight(20_000), 0.85, 0, "fp8", "trtllm", True)
    waits = run.prompt_tokens == run.output_tokens == 1024 and run.tensor_parallel < 8
    wait = Wait(int(0.9 * 16_384), 20) if waits else NO_WAIT
    return Engine(InFlight(16_384), 0.9, 0, "fp8", "trtllm", True, wait)


def kv_tokens(run: Run, engine: Engine, spec: ModelSpec) -> int:
    """Tokens that the KV cache of the run's instance holds."""
    memory = catalog.device(run.device).memory_bytes
    weights = per_device_weights(
        weight_bytes(spec, "fp4" if run.number == "mxfp4" else run.number), run.tensor_parallel
    )
    work = activation_bytes(spec, "cuda", Workspace(rows=8_192, outputs=run.concurrency))[0] // run.tensor_parallel
    work += RESIDENCY["cuda"].base_bytes
    share = engine.memory_share
    room = (memory - weights - work) * share if engine.whole_reservation else memory * share - weights - work
    token = kv_bytes_per_token(spec, engine.kv) * per_device_kv_heads(spec, run.tensor_parallel) / spec.num_kv_heads
    return int(room / token)


def lengths(run: Run, count: int) -> Iterable[tuple[int, int]]:
    """(prompt, output) of each request. InferenceMAX draws uniformly from 80 to 100 % (RANDOM_RANGE_RATIO 0.8)."""
    for index in range(count):
        if run.inference_max:
            yield tuple(  # type: ignore[misc]
                round(tokens * (0.8 + 0.2 * uniform(7 + axis, index)))
                for axis, tokens in enumerate((run.prompt_tokens, run.output_tokens))
            )
        else:
            yield run.prompt_tokens, run.output_tokens


def simulate(run: Run) -> tuple[float, float]:
    """(mean TTFT, mean TPOT) in milliseconds, simulated: ten requests for each client, as both benchmarks send."""
    spec, engine = catalog.model(run.model), engine_of(run)
    found = tables(run.device, run.model, engine.kernels)
    timer = OperatorTimer(found, run.tensor_parallel, run.number, engine.kv, engine.host_ns)
    blocks = kv_tokens(run, engine, spec) // BLOCK_TOKENS
    whole = -(-(run.prompt_tokens + run.output_tokens) // BLOCK_TOKENS)
    if blocks < whole:
        raise MegalithError(f"{run.key}: {blocks} KV blocks are left, and one request needs {whole}.")
    most = min(run.concurrency, blocks // whole) if engine.whole_reservation else run.concurrency
    scheduler = Scheduler(
        engine.policy, KvAccount(blocks, BLOCK_TOKENS, prefix_cache=False), Limits(max_sequences=most)
    )
    clients = [
        Client(Request(index, 0, prompt, output), output)
        for index, (prompt, output) in enumerate(lengths(run, 10 * run.concurrency))
    ]
    ClosedLoop(scheduler, timer, clients, engine.wait, overlap=not engine.host_ns).run(run.concurrency)
    ttft = statistics.fmean(client.first_ps - client.sent_ps for client in clients) / PS_PER_MS
    tpot = statistics.fmean((c.last_ps - c.first_ps) / (c.output_tokens - 1) for c in clients) / PS_PER_MS
    return ttft, tpot


def published_runs(data: Path = DATA) -> list[Run]:
    """Every aggregated run of a model and device that have tables, in a number type that has them; no run twice."""
    columns = (
        "id, model_path, system, backend, coalesce(backend_version, ''), coalesce(precision, ''), tp_size, "
        "concurrency, isl, osl, measured is not null, silicon_ttft_ms, silicon_tpot_ms"
    )
    rows = duckdb.sql(
        f"select {columns} from '{data / 'silicon_e2e.parquet'}' where mode = 'agg' and concurrency is not null "
        "and pp_size = 1 and coalesce(attention_dp_size, 1) = 1 and coalesce(moe_ep_size, 1) = 1 order by id"
    ).fetchall()
    runs: dict[tuple[object, ...], Run] = {}
    for key, path, system, *rest in rows:
        if path in MODELS and system in DEVICES:
            backend, version, precision, degree, clients, isl, osl, dated, ttft, tpot = rest
            run = Run(key, MODELS[path], DEVICES[system], backend, version, precision, int(degree), int(clients),
                      int(isl), int(osl), bool(dated), ttft, tpot)  # fmt: skip
            dense_fp4 = precision == "fp4" and run.model != "gpt-oss-120b"
            if not dense_fp4 and not (run.model == "gpt-oss-120b" and precision != "fp4"):
                same = (run.model, run.device, backend, precision, degree, clients, isl, osl, round(ttft, 6))
                runs.setdefault(same, run)
    return list(runs.values())


@dataclass(frozen=True)
class Error:
    """Relative errors of one run, simulated over measured, less one."""

    run: Run
    ttft_ms: float
    tpot_ms: float

    @property
    def ttft(self) -> float:
        return self.ttft_ms / self.run.ttft_ms - 1.0

    @property
    def tpot(self) -> float:
        return self.tpot_ms / self.run.tpot_ms - 1.0


def quantile(values: Iterable[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table_row(name: str, errors: Sequence[Error]) -> str:
    """One line of the table."""
    cells = [name, str(len(errors))]
    for values in ([error.tpot for error in errors], [error.ttft for error in errors]):
        sizes = [abs(value) for value in values]
        cells += [f"{statistics.median(sizes):.1%}", f"{quantile(sizes, 0.9):.1%}", f"{statistics.median(values):+.1%}"]
    return f"| {' | '.join(cells)} |"


HEAD = """| set | runs | TPOT median error | p90 | bias | TTFT median error | p90 | bias |
|---|---:|---:|---:|---:|---:|---:|---:|"""


AICONFIGURATOR = (
    ("Qwen3-32B FP8, H100, TensorRT-LLM (57)", ("qwen3-32b", "h100-sxm", "trtllm", "fp8"), 0.38, 0.09),
    ("gpt-oss-120b, H100, vLLM (58)", ("gpt-oss-120b", "h100-sxm", "vllm", "mxfp4"), 0.35, 0.06),
    ("Llama-3.1-8B FP8, H200, SGLang (46)", ("llama-3.1-8b", "h200", "sglang", "fp8"), 0.82, 0.14),
    ("Llama-3.1-8B FP8, H200, vLLM (21)", ("llama-3.1-8b", "h200", "vllm", "fp8"), 0.30, 1.17),
)
"""Sets (with how many runs), and AIConfigurator 0.12's own median errors of TTFT and TPOT, asked as a user would."""


def judged(options: argparse.Namespace) -> list[Error]:
    """Every run that can be replayed; prints those that cannot."""
    errors, refused = [], Counter[str]()
    for run in published_runs(options.data)[:: options.every]:
        try:
            errors.append(Error(run, *simulate(run)))
        except MegalithError as error:
            refused[str(error)] += 1
    for text, count in refused.items():
        print(f"not run ({count}): {text}")
    return errors


def print_runs(errors: Iterable[Error]) -> None:
    for error in errors:
        run = error.run
        print(
            f"{run.device:9}{run.model:15}{run.backend:7}{run.precision:4} tp{run.tensor_parallel} "
            f"{run.prompt_tokens:5}/{run.output_tokens:<5}c{run.concurrency:<4} "
            f"TTFT {error.ttft_ms:9.1f} of {run.ttft_ms:9.1f} {error.ttft:+7.1%}  "
            f"TPOT {error.tpot_ms:7.2f} of {run.tpot_ms:7.2f} {error.tpot:+7.1%}"
        )


def print_tables(errors: Sequence[Error]) -> None:
    groups: dict[str, list[Error]] = {}
    for error in errors:
        run = error.run
        groups.setdefault(f"{run.model} {run.number}, {run.device}, {run.backend}", []).append(error)
    dense = [error for error in errors if error.run.model != "gpt-oss-120b"]
    print(
        HEAD, *[table_row(name, groups[name]) for name in sorted(groups)], table_row("**all dense**", dense), sep="\n"
    )
    print("\n| AIConfigurator's set | its TTFT | ours | its TPOT | ours | our runs |\n|---|---:|---:|---:|---:|---:|")
    for name, key, ttft, tpot in AICONFIGURATOR:
        ours = [e for e in errors if (e.run.model, e.run.device, e.run.backend, e.run.number) == key]
        first, each = (
            [f"{statistics.median(map(abs, values)):.0%}" if ours else "no rows"]
            for values in ([error.ttft for error in ours], [error.tpot for error in ours])
        )
        print(f"| {name} | {ttft:.0%} | {first[0]} | {tpot:.0%} | {each[0]} | {len(ours)} |")
    sizes = sorted(abs(error.tpot) for error in dense)
    figures = statistics.median(sizes), quantile(sizes, 0.9), statistics.median(abs(error.ttft) for error in dense)
    for name, figure, bar in zip(("TPOT median", "TPOT p90", "TTFT median"), figures, BARS, strict=True):
        print(f"gate, dense models: {name} error {figure:.1%}, bar {bar:.0%}: {'pass' if figure <= bar else 'FAIL'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", action="store_true", help="print every run")
    parser.add_argument("--every", type=int, default=1, help="only every n-th run")
    options = parser.parse_args()
    errors = judged(options)
    if options.rows:
        print_runs(errors)
    print_tables(errors)


if __name__ == "__main__":
    main()
