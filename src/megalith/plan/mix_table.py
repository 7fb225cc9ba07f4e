"""How many requests of one size an instance can take, and a load as groups of requests of similar size.

Mélange measures the first on hardware, once for each device, prompt and answer length: the most requests a second at
which the mean TPOT stays within the service level. Here it is a pure function of the cost model, so it is `predicted`.

B requests of I prompt and O answer tokens decode together, at mean context I + O/2. Each stays for O - 1 steps and
brings its prompt once, so a step carries on average k = B / (O - 1) new prompts, and with S(B) its mean duration

    TPOT = S(B),   requests a second = k / S(B) = B / ((O - 1) S(B))

which grows with B. B is the largest that keeps TPOT and that the KV cache, the limit on sequences and the token budget
allow. Where one request after another is too much already (short answers to long prompts), requests come less often
than they leave: at r a second, steps of D(1) and prompts that take P,

    TPOT = D(1) / (1 - r P),   so   r = (1 - D(1) / limit) / P

Knows the cost model and a load; must not know prices or the integer program.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import ceil, floor, inf
from typing import Literal, NamedTuple, TypeAlias

from megalith.cost.timer import PS_PER_NS, Prompt
from megalith.plan.fleet_bounds import PS_PER_S, Ability
from megalith.plan.fleet_load import Load

Knows: TypeAlias = Literal["sizes", "prompt"]
"""What a router may look at: prompt and answer length (as published; the answer is an estimate in practice and the
truth in a simulation), or the prompt alone, which every router knows."""

EDGES = (25, 100, 250, 500, 1_000, 2_000)
"""Largest lengths of the buckets (Mélange, section 4.1); each further one is twice as long."""


class Size(NamedTuple):
    """Requests of one bucket."""

    prompt_tokens: float
    """Mean, as all here."""
    answer_tokens: float
    rate_per_s: float
    group: int
    """Those that a router cannot tell apart have the same."""


def most_requests_per_s(
    ability: Ability, prompt_tokens: float, answer_tokens: float, tpot_ns: float = inf, host_ns: float = 0.0
) -> float:
    """Requests of that size a second that an instance sustains within a mean TPOT; 0 where it cannot.

    `host_ns` is added to every step: what an engine does on the processor between two passes, 0 in the cost model's
    own engine.
    """
    prompt, answer = max(1, round(prompt_tokens)), max(1.0, answer_tokens)
    if prompt + answer > min(ability.max_context, ability.kv_tokens):
        return 0.0
    if answer < 2:
        together = max(1, ability.token_budget // prompt)
        return together / ((_prompts_ps(ability, prompt, together, 0, 0.0) + host_ns * PS_PER_NS) / PS_PER_S)
    held = prompt + answer / 2
    low, high = 0, max(1, min(ability.max_sequences, int(ability.kv_tokens / held)))
    while low < high:
        middle = (low + high + 1) // 2
        step_ps = mean_step_ps(ability, prompt, answer, middle) + host_ns * PS_PER_NS
        low, high = (middle, high) if step_ps <= tpot_ns * PS_PER_NS and step_ps < inf else (low, middle - 1)
    if not low:
        return _seldom(ability, prompt, answer, tpot_ns, host_ns)
    step_ps = mean_step_ps(ability, prompt, answer, low) + host_ns * PS_PER_NS
    return low / ((answer - 1) * step_ps) * PS_PER_S


def _seldom(ability: Ability, prompt: int, answer: float, tpot_ns: float, host_ns: float) -> float:
    """Requests a second of which fewer than one is there on average; 0 where a lone decode is too slow."""
    plain_ps = ability.decode_ps(1, prompt + answer / 2) + host_ns * PS_PER_NS
    host_ps = ceil(prompt / ability.token_budget) * host_ns * PS_PER_NS
    prompt_ps = _prompts_ps(ability, prompt, 1, 0, 0.0) + host_ps
    within = 1 - plain_ps / (tpot_ns * PS_PER_NS)
    return max(0.0, min(within / prompt_ps, 1 / (prompt_ps + (answer - 1) * plain_ps))) * PS_PER_S


def mean_step_ps(ability: Ability, prompt_tokens: int, answer_tokens: float, decodes: int) -> float:
    """Mean duration of a step with so many decodes and the prompts that come meanwhile; infinite when these are more
    than the token budget takes."""
    context = prompt_tokens + answer_tokens / 2
    prompts = decodes / (answer_tokens - 1)
    plain = float(ability.decode_ps(decodes, context))
    room = ability.token_budget - decodes
    if room < 1 or prompts * prompt_tokens > room:
        return inf
    if prompt_tokens > room or prompts < 1:
        # A prompt takes one step or several; the others have none.
        if prompts * ceil(prompt_tokens / room) > 1:
            return inf
        return plain + prompts * _longer_ps(ability, prompt_tokens, decodes, context)
    whole = floor(prompts)
    less = _prompts_ps(ability, prompt_tokens, whole, decodes, context)
    if whole == prompts:
        return less
    return less + (prompts - whole) * (_prompts_ps(ability, prompt_tokens, whole + 1, decodes, context) - less)


def _prompts_ps(ability: Ability, prompt_tokens: int, prompts: int, decodes: int, context: float) -> float:
    """A step with so many whole prompts, or the steps of one that is longer than the budget."""
    if prompt_tokens > ability.token_budget - decodes:
        plain = ability.decode_ps(decodes, context) if decodes else 0
        return plain + _longer_ps(ability, prompt_tokens, decodes, context)
    chunk = Prompt(prompt_tokens, 0, True)
    return float(ability.timer.step_ps((chunk,) * prompts, decodes, round(decodes * context), ceil(context)))


def _longer_ps(ability: Ability, prompt_tokens: int, decodes: int, context: float) -> float:
    """By how much a prompt, in chunks, makes the steps of the decodes longer together."""
    room, total, longest = ability.token_budget - decodes, round(decodes * context), ceil(context)
    plain = ability.decode_ps(decodes, context) if decodes else 0
    sum_ps = 0
    for begin in range(0, prompt_tokens, room):
        end = min(begin + room, prompt_tokens)
        chunk = Prompt(end - begin, begin, end == prompt_tokens)
        sum_ps += ability.timer.step_ps((chunk,), decodes, total, longest) - plain
    return float(sum_ps)


def bucket(tokens: int) -> int:
    """The number of the bucket that a length falls into."""
    if tokens <= EDGES[-1]:
        return bisect_left(EDGES, tokens)
    return len(EDGES) + (-(-tokens // EDGES[-1]) - 1).bit_length() - 1


def group_key(prompt_tokens: int, answer_tokens: int, knows: Knows) -> tuple[int, ...]:
    """What a router sees of a request."""
    return (bucket(prompt_tokens),) if knows == "prompt" else (bucket(prompt_tokens), bucket(answer_tokens))


def sizes(load: Load, knows: Knows) -> tuple[list[Size], list[tuple[int, ...]]]:
    """(buckets of a load at its mean rate, what the router sees of each group)."""
    cells: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for prompt, answer in zip(load.prompts.tolist(), load.outputs.tolist(), strict=True):
        cells.setdefault((bucket(prompt), bucket(answer)), []).append((prompt, answer))
    keys: dict[tuple[int, ...], int] = {}
    found = []
    for _, requests in sorted(cells.items()):
        count = len(requests)
        group = keys.setdefault(group_key(*requests[0], knows), len(keys))
        prompts, answers = (sum(column) / count for column in zip(*requests, strict=True))
        found.append(Size(prompts, answers, load.rate_per_s * count / load.requests, group))
    return found, list(keys)


def loads(buckets: Sequence[Size], throughput: Sequence[Sequence[float]]) -> list[list[float]]:
    """[group][type]: instances of the type that the group keeps busy. `throughput[type][bucket]`, requests a second."""
    groups = max(size.group for size in buckets) + 1
    found = [[0.0] * len(throughput) for _ in range(groups)]
    for place, size in enumerate(buckets):
        for kind, most in enumerate(throughput):
            found[size.group][kind] += size.rate_per_s / most[place] if most[place] > 0 else inf
    return found
