"""The scheduler on a toy machine: no model, no clock, the real scheduler objects. Prints the tables of the guide.

    python examples/scheduling.py

The machine's step costs a fixed part, a part for each row and a part for each token of context, in integer
nanoseconds. Figures are simulated and the same on every machine; they compare policies, not hardware.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, pairwise

from megalith.base.random import uniform
from megalith.policy.batching import POLICY_NAMES, by_name
from megalith.policy.facts import PreemptMode, Request, StepPlan
from megalith.policy.hashing import block_hashes
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler

STEP_NS, ROW_NS, CONTEXT_NS = 2_000_000, 60_000, 60
BLOCK_TOKENS = 16
SECOND_NS = 1_000_000_000


@dataclass
class Job:
    """A request with what only the world knows: how long its answer will be."""

    request: Request
    output_tokens: int
    token_ns: list[int] = field(default_factory=list)


def workload(count: int, gap_ns: int, shared_tokens: int = 0) -> list[Job]:
    """Every fourth prompt is long, the rest are short. All start with the same `shared_tokens` tokens."""
    jobs = []
    at_ns = 0
    for index in range(count):
        at_ns += round(2 * gap_ns * uniform(1, index))
        own = 1000 + round(1000 * uniform(2, index)) if index % 4 == 3 else 20 + round(180 * uniform(2, index))
        output = 20 + round(160 * uniform(3, index))
        tokens = [7] * shared_tokens + [1000 + index] * own
        request = Request(index, at_ns, len(tokens), 200, 0, block_hashes(tokens, BLOCK_TOKENS))
        jobs.append(Job(request, output))
    return jobs


def step_ns(plan: StepPlan) -> int:
    """What the toy machine takes for one step; a swapped block costs as much as 16 tokens of context."""
    context = sum(chunk.context_tokens + chunk.new_tokens for chunk in plan.chunks)
    moved = sum(len(move.device_blocks) for move in (*plan.preempts, *plan.resumes))
    return STEP_NS + ROW_NS * plan.num_tokens + CONTEXT_NS * (context + 16 * moved)


def run(scheduler: Scheduler, jobs: list[Job]) -> tuple[int, int]:
    """Serve the jobs. Returns (steps, end in ns); token times are left in the jobs."""
    by_id = {job.request.id: job for job in jobs}
    waiting = sorted(jobs, key=lambda job: job.request.arrival_ns, reverse=True)
    now_ns = steps = 0
    while waiting or scheduler.num_running or scheduler.num_waiting or scheduler.num_swapped:
        while waiting and waiting[-1].request.arrival_ns <= now_ns:
            scheduler.add(waiting.pop().request)
        plan = scheduler.plan()
        if not plan.chunks:
            now_ns = waiting[-1].request.arrival_ns
            continue
        now_ns += step_ns(plan)
        steps += 1
        done = []
        for chunk in plan.chunks:
            if chunk.samples:
                job = by_id[chunk.request_id]
                job.token_ns.append(now_ns)
                if len(job.token_ns) == job.output_tokens:
                    done.append(chunk.request_id)
        scheduler.complete(plan, done)
    scheduler.check_integrity()
    return steps, now_ns


def percentile(values: list[int], share: float) -> int:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(name: str, scheduler: Scheduler, jobs: list[Job]) -> str:
    """One line of a table."""
    steps, end_ns = run(scheduler, jobs)
    first = [job.token_ns[0] - job.request.arrival_ns for job in jobs]
    gaps = [[b - a for a, b in pairwise(job.token_ns)] for job in jobs]
    rate = sum(job.output_tokens for job in jobs) * SECOND_NS / end_ns
    longest = [max(gap) for gap in gaps]
    counters = scheduler.counters
    cells = (
        name,
        f"{steps:,}",
        f"{rate:.0f}",
        f"{percentile(first, 0.5) / 1e6:.0f}",
        f"{percentile(first, 0.95) / 1e6:.0f}",
        f"{percentile(list(chain(*gaps)), 0.5) / 1e6:.1f}",
        f"{percentile(longest, 0.95) / 1e6:.0f}",
        f"{counters.preemptions}",
        f"{100 * counters.prefix_hit_tokens // counters.prefix_queried_tokens} %",
    )
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "",
    "steps",
    "output tok/s",
    "TTFT p50 ms",
    "TTFT p95 ms",
    "ITL p50 ms",
    "longest ITL of a request, p95 ms",
    "preemptions",
    "prefix hits",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def policies() -> str:
    """The batch policies on the same arrivals, with room for everyone."""
    lines = [HEAD]
    for name in POLICY_NAMES:
        kv = KvAccount(2000, BLOCK_TOKENS)
        scheduler = Scheduler(by_name(name, 256), kv, Limits(max_sequences=32))
        lines.append(row(name, scheduler, workload(200, 75_000_000)))
    return "\n".join(lines)


def memory() -> str:
    """SplitFuse with too few KV blocks and a shared beginning of 256 tokens: cache, watermark and preempt mode."""
    variants: tuple[tuple[str, bool, int, PreemptMode], ...] = (
        ("no prefix cache", False, 0, "recompute"),
        ("prefix cache", True, 0, "recompute"),
        ("and a watermark of 8 blocks", True, 8, "recompute"),
        ("and swapping", True, 8, "swap"),
    )
    lines = [HEAD]
    for name, cache, watermark, mode in variants:
        kv = KvAccount(260, BLOCK_TOKENS, 400 if mode == "swap" else 0, cache, watermark)
        scheduler = Scheduler(by_name("splitfuse", 256), kv, Limits(max_sequences=32, preempt=mode))
        lines.append(row(name, scheduler, workload(200, 75_000_000, shared_tokens=256)))
    return "\n".join(lines)


if __name__ == "__main__":
    print(policies())
    print()
    print(memory())
