"""What a request takes alone on a reference instance: the yardstick of a slowdown (Splitwise, ISCA 2024, section VI-A).

Knows a StepTimer and lengths; must not know fleets or queues. The prompt is computed in one step, or in chunks of at
most `token_budget`; then every token takes a step of its own.
"""

from __future__ import annotations

import numpy as np

from megalith.cost.timer import PS_PER_NS, Prompt, StepTimer
from megalith.sim.attainment import Latencies, Reference
from megalith.sim.histogram import IntArray

_MOST_KNOWN = 100_000


def alone(timer: StepTimer, token_budget: int | None = None) -> Reference:
    """The times of requests alone on an instance with this timer, rounded up to nanoseconds as the simulator does."""
    known: dict[tuple[int, int], tuple[int, int, int]] = {}

    def times(prompt_tokens: IntArray, output_tokens: IntArray) -> Latencies:
        rows = []
        for pair in zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True):
            found = known.get(pair)
            if found is None:
                if len(known) >= _MOST_KNOWN:
                    known.clear()
                found = known[pair] = _times(timer, *pair, token_budget or max(pair[0], 1))
            rows.append(found)
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return Latencies(columns[:, 0], columns[:, 1], columns[:, 2])

    return times


def _times(timer: StepTimer, prompt_tokens: int, output_tokens: int, budget: int) -> tuple[int, int, int]:
    """(ttft_ns, tpot_ns, e2e_ns); the TPOT of one token alone is that of the second."""
    first_ps = 0
    for begin in range(0, prompt_tokens, budget):
        new = min(budget, prompt_tokens - begin)
        first_ps += timer.step_ps((Prompt(new, begin, begin + new == prompt_tokens),), 0, 0, 0)
    decode_ps, context, left = 0, prompt_tokens, max(output_tokens - 1, 1)
    while left:
        line = timer.decode_line(1, context, context)
        steps = min(line.steps, left)
        decode_ps += line.total_ps(steps)
        context += steps
        left -= steps
    ttft_ns = -(-first_ps // PS_PER_NS)
    if output_tokens < 2:
        return ttft_ns, max(1, decode_ps // PS_PER_NS), ttft_ns
    e2e_ns = -(-(first_ps + decode_ps) // PS_PER_NS)
    return ttft_ns, max(1, (e2e_ns - ttft_ns) // (output_tokens - 1)), e2e_ns
