"""What a kind of fleet can do at best, by arithmetic: floors of TTFT and TPOT without any queue, and the least number
of instances that the work, the memory and the service level allow. A fleet below that number need not be simulated.

Every bound here is optimistic on purpose: prompts in the best chunks, decodes in the largest batch that TPOT and the KV
cache allow, no imbalance. Knows the cost model and a load; must not simulate.
"""

from __future__ import annotations

from functools import cached_property
from math import ceil, inf
from typing import NamedTuple

import numpy as np

from megalith.base.units import NS_PER_S, format_duration
from megalith.cost.timer import PS_PER_NS, Prompt
from megalith.plan.fleet_load import Column, Load
from megalith.plan.fleet_question import FleetQuestion, Shape, Size
from megalith.sim.build import Builder
from megalith.sim.reference import alone
from megalith.specs.slo import Bound, Slo

PS_PER_S = PS_PER_NS * NS_PER_S
_CHUNKS = (256, 512, 1024, 2048)


class Discard(NamedTuple):
    """Why no fleet of a kind will do."""

    resource: str
    why: str


class Least(NamedTuple):
    """Fewer instances than that cannot do the work."""

    instances: int
    resource: str
    prefill: int = 0
    """Where prompts have a pool of their own, its least size."""
    decode: int = 0


class Ability:
    """One instance of a kind of fleet."""

    def __init__(self, question: FleetQuestion, shape: Shape) -> None:
        """Raises DoesNotFit, or ConfigError for a device, degree or format that cannot be."""
        self.shape = shape
        least = Size(shape.smallest, 1 if shape.split else 0)
        fleet = shape.fleet(least)
        builder = Builder(question.scenario(fleet))
        kind = next(iter(builder.kinds.values()))
        self.timer, self.power, self.timing = kind.timer, kind.power, kind.timing
        self.kv_tokens = kind.kv_blocks * kind.block_tokens
        self.max_context = builder.max_context
        self.token_budget = fleet.pools[0].token_budget
        self.max_sequences = fleet.pools[0].max_sequences
        self.price_per_hour_usd = question.instance_price_usd(shape)
        """Of one instance."""
        self._alone = alone(self.timer, self.token_budget)

    def alone_ns(self, prompt_tokens: int, output_tokens: int) -> tuple[int, int, int]:
        """(TTFT, TPOT, E2E) of a request that has an instance for itself."""
        times = self._alone(np.array([prompt_tokens]), np.array([output_tokens]))
        return int(times.ttft_ns[0]), int(times.tpot_ns[0]), int(times.e2e_ns[0])

    @cached_property
    def prompt_token_ps(self) -> float:
        """Of one prompt token, in the best chunk."""
        chunks = [chunk for chunk in _CHUNKS if chunk <= self.token_budget] or [self.token_budget]
        return min(self.timer.step_ps((Prompt(chunk, 0, False),), 0, 0, 0) / chunk for chunk in chunks)

    def decode_ps(self, decodes: int, context: float) -> int:
        """Of one step of decodes with that mean context."""
        total = round(decodes * context)
        return self.timer.decode_line(decodes, total, ceil(context)).first_ps

    def most_decodes(self, context: float, limit_ns: float = inf) -> int:
        """The largest batch that the KV cache holds and whose step stays within the limit; at least 1."""
        low, high = 1, max(1, min(self.max_sequences, int(self.kv_tokens / max(context, 1.0))))
        while low < high:
            middle = (low + high + 1) // 2
            if self.decode_ps(middle, context) <= limit_ns * PS_PER_NS:
                low = middle
            else:
                high = middle - 1
        return low


class Limits(NamedTuple):
    """The tightest limits in time of a service level, each with the share of the requests that must keep it."""

    ttft: tuple[float, float]
    tpot: tuple[float, float]
    e2e: tuple[float, float]
    percent: float
    """The smallest share that some bound asks for."""


def limits(slo: Slo) -> Limits:
    """(limit in ns, percent) by metric; (inf, 100) where there is none. Slowdowns and gaps are left out."""

    def tightest(metric: str) -> tuple[float, float]:
        found = [
            (float(bound.limit_ns), percent_of(bound, slo))
            for bound in slo.bounds
            if bound.metric == metric and bound.limit_ns is not None
        ]
        return min(found, default=(inf, 100.0))

    percent = min(percent_of(bound, slo) for bound in slo.bounds)
    return Limits(tightest("ttft"), tightest("tpot"), tightest("e2e"), percent)


def percent_of(bound: Bound, slo: Slo) -> float:
    """The share of the requests that must keep a bound."""
    return slo.attain_percent if bound.percent is None else bound.percent


def discard(ability: Ability, load: Load, slo: Slo) -> Discard | None:
    """Why no number of instances can keep the service level; None when one may."""
    reach = load.at_percent(load.prompts, limits(slo).percent)
    if reach >= ability.max_context:
        many = f"{limits(slo).percent:g} % of the prompts reach to {reach:,} tokens"
        return Discard("KV memory", f"{many} and an instance holds {ability.max_context:,}")
    for bound in slo.bounds:
        if bound.limit_ns is None:
            continue
        floor_ns = floor(ability, load, bound, percent_of(bound, slo))
        if floor_ns > bound.limit_ns:
            resource = {"ttft": "prompt speed", "e2e": "speed"}.get(bound.metric, "decode speed")
            least = f"{bound.metric} is {format_duration(floor_ns)} at best, without any queue"
            return Discard(resource, f"{least}; {bound} asks for {format_duration(bound.limit_ns)}")
    return None


def floor(ability: Ability, load: Load, bound: Bound, percent: float) -> float:
    """The figure of a bound in a fleet without end, in nanoseconds: every request alone, what can be cached cached."""
    match bound.metric:
        case "ttft":
            return ability.alone_ns(load.at_percent(load.fresh, percent), 1)[0]
        case "tpot":
            several = load.outputs > 1
            if not several.any():
                return 0.0
            contexts = (load.prompts + load.outputs // 2)[several]
            context = int(sorted(contexts.tolist())[max(ceil(percent * len(contexts) / 100), 1) - 1])
            return ability.decode_ps(1, context) / PS_PER_NS
        case "e2e":
            # Each request takes at least what its fresh tokens and its decodes at the shortest context take.
            prompt_ns = ability.prompt_token_ps / PS_PER_NS
            decode_ns = ability.decode_ps(1, float(load.prompts.min())) / PS_PER_NS
            least: Column = (load.fresh * prompt_ns + (load.outputs - 1) * decode_ns).astype("int64")
            return float(load.at_percent(least, percent))
        case _:
            return ability.decode_ps(1, float(load.prompts.min())) / PS_PER_NS


def least_instances(ability: Ability, load: Load, slo: Slo) -> Least:
    """Instances below which the work cannot be done in the time that the service level leaves."""
    found = limits(slo)
    wait_s = min(found.ttft[0], found.e2e[0]) / NS_PER_S
    longest = float(load.outputs.max())
    rest_s = min(wait_s + found.tpot[0] / NS_PER_S * longest, found.e2e[0] / NS_PER_S)
    prompt_s, decode_s, kv_s = _work(ability, load, found)
    prefill = _count(prompt_s, load.span_s + wait_s)
    decode = _count(decode_s, load.span_s + rest_s)
    memory = _count(kv_s, load.span_s + rest_s)
    named = {"prompt compute": prefill, "decode speed": decode, "KV memory": memory}
    resource = max(named, key=lambda name: named[name])
    if ability.shape.setup == "distserve":  # elsewhere an instance may help the other pool
        decode = max(decode, memory)
        return Least(max(prefill + decode, 2), resource, prefill, decode)
    return Least(max(named[resource], ability.shape.smallest), resource)


def _work(ability: Ability, load: Load, found: Limits) -> tuple[float, float, float]:
    """Seconds of one instance for the prompts, for the decodes, and seconds x KV caches: each a lower bound.

    Only the share of the requests that must keep the service level counts, and of these the cheapest.
    """
    prompt_s = load.smallest_sum(load.fresh, found.percent) * ability.prompt_token_ps / PS_PER_S
    tokens: Column = load.outputs - 1
    context = load.mean_context
    limit_ns, percent = found.tpot
    counted = load.smallest_sum(tokens, found.percent)
    bound_tokens = min(load.smallest_sum(tokens, percent), counted)
    # Token-weighted, the mean batch of those within the limit is at most the one whose step takes just that long.
    within = ability.most_decodes(1.0, limit_ns)
    free = ability.most_decodes(1.0)
    decode_s = (
        bound_tokens * ability.decode_ps(within, 1.0) / within
        + (counted - bound_tokens) * ability.decode_ps(free, 1.0) / free
    ) / PS_PER_S
    held: Column = (load.prompts + load.outputs // 2) * tokens
    step_s = ability.decode_ps(1, 1.0) / PS_PER_S
    kv_s = load.smallest_sum(held, found.percent) * step_s / ability.kv_tokens
    # The cheapest decodes may have any context: what reading the KV takes is counted by token.
    read_ps = (ability.decode_ps(within, context) - ability.decode_ps(within, 1.0)) / (within * max(context - 1.0, 1.0))
    decode_s += load.smallest_sum(held, found.percent) * max(read_ps, 0.0) / PS_PER_S
    return prompt_s, decode_s, kv_s


def _count(work_s: float, time_s: float) -> int:
    """Instances for so much work; 1 when there is time without end. A millionth of rounding is forgiven."""
    return max(1, ceil(work_s / time_s - 1e-6)) if time_s < inf else 1


def least_power_w(ability: Ability, load: Load, slo: Slo, instances: int) -> float:
    """What so many instances draw at least, on average; 0 where no power is known."""
    power = ability.power
    if power is None:
        return 0.0
    prompt_s, decode_s, _ = _work(ability, load, limits(slo))
    longer = load.span_s * 1.5  # a run takes a little longer than its arrivals
    extra_w = max(
        prompt_s * (power.prompt_w - power.idle_w) / longer, decode_s * (power.decode_w - power.idle_w) / longer
    )
    return ability.shape.tensor_parallel * (instances * power.idle_w + max(extra_w, 0.0))
