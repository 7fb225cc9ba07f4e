"""Steady-state prediction of a fleet: TTFT and TPOT from queueing formulae and the cost model, in milliseconds of work.

Where the simulator is asked too, this only says where to look first; asked alone, its figures are predictions. What it
assumes: requests spread evenly, gaps of the observed coefficient of variation, no preemption, no migration.

Decodes: an instance that gets r requests a second holds B = r * E[tokens] * D of them, where D is the time of a step of
B decodes and the prompt tokens that come meanwhile (a fixed point). Prompts wait as in an M/G/n queue (Sakasegawa's
formula; exponential tail).
"""

from __future__ import annotations

from math import ceil, inf, isfinite, log, sqrt
from typing import NamedTuple

from megalith.base.units import NS_PER_S
from megalith.cost.timer import PS_PER_NS, Prompt
from megalith.plan.fleet_bounds import PS_PER_S, Ability, limits, percent_of
from megalith.plan.fleet_load import Load
from megalith.plan.fleet_question import Size
from megalith.report.percentiles import rank
from megalith.specs.slo import Slo

_KNOTS = 32
_MOST_ROUNDS = 60
_TAIL = 1.15
"""Of the mean TPOT to that of a slow request. Assumption; it decides only where the search starts."""
_KV_SHARE = 0.95


class Prediction(NamedTuple):
    """A fleet in steady state; predicted."""

    ttft_ns: float
    """At the share of the requests that its bound asks for; infinite when the work is too much."""
    tpot_ns: float
    prompt_share: float
    """Of an instance's time, that in which it computes prompts."""
    kv_share: float
    margin: float
    """Least of 1 - figure / limit over the bounds, as far as times can say; negative when one is broken."""
    resource: str
    """What is short."""

    @property
    def kept(self) -> bool:
        """Whether the service level would be kept."""
        return self.margin >= 0


class Steady:
    """Predicts fleets of one kind under one load."""

    def __init__(self, ability: Ability, load: Load, slo: Slo) -> None:
        self._ability, self._load, self._slo = ability, load, slo
        self._limits = limits(slo)
        ordered = sorted(load.fresh.tolist())
        places = [rank(len(ordered), 100 * (i + 0.5) / _KNOTS) - 1 for i in range(_KNOTS)]
        self._knots = [int(ordered[place]) for place in places]
        self._tail = load.at_percent(load.fresh, self._limits.ttft[1] if self._limits.ttft[0] < inf else 90.0)
        self._mean_fresh = float(load.fresh.mean())
        self._tokens = load.decoded / load.requests

    def predict(self, size: Size) -> Prediction:
        """The prediction for a size."""
        if size.prefill:
            return self._split(size)
        rate = self._load.rate_per_s / size.instances
        step_ps, decodes = self._mixed_step(rate)
        if not isfinite(step_ps):
            return self._lost()
        services = [self._prompt_ps(tokens, decodes) for tokens in self._knots]
        wait_s, share = self._wait(services, rate, size.instances)
        tail_s = (self._prompt_ps(self._tail, decodes) + step_ps / 2) / PS_PER_S
        return self._judge(wait_s + tail_s, step_ps * _TAIL, share, self._held(decodes))

    def smallest(self, least: int, most: int) -> tuple[Size, Prediction] | None:
        """The smallest size that keeps the service level by prediction; None when none up to `most` does."""

        share = self.prefill_share

        def best(instances: int) -> tuple[Size, Prediction]:
            found = [(size, self.predict(size)) for size in self._ability.shape.sizes(instances, share, 6)]
            return max(found, key=lambda pair: pair[1].margin)

        low, high = least - 1, least
        while high <= most and not best(high)[1].kept:
            low, high = high, high * 2
        if high > most:
            if low >= most or not best(most)[1].kept:
                return None
            high = most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if best(middle)[1].kept else (middle, high)
        return best(high)

    @property
    def prefill_share(self) -> float:
        """Of the instances, those that the prompts keep busy, when both pools are as busy."""
        prompt_s = self._load.rate_per_s * self._mean_prompt_ps() / PS_PER_S
        decodes = self._ability.most_decodes(self._load.mean_context, self._limits.tpot[0])
        token_ps = self._ability.decode_ps(decodes, self._load.mean_context) / decodes
        decode_s = self._load.rate_per_s * self._tokens * token_ps / PS_PER_S
        return prompt_s / max(prompt_s + decode_s, 1e-12)

    def _split(self, size: Size) -> Prediction:
        rate = self._load.rate_per_s / size.decode
        step_ps, decodes = self._decode_step(rate)
        services = [self._prompt_ps(tokens, 0.0) for tokens in self._knots]
        wait_s, share = self._wait(services, self._load.rate_per_s / size.prefill, size.prefill)
        if not isfinite(step_ps) or not isfinite(wait_s):
            return self._lost("decode speed" if isfinite(wait_s) else "prompt compute")
        tail_s = self._prompt_ps(self._tail, 0.0) / PS_PER_S
        return self._judge(wait_s + tail_s, step_ps * _TAIL, share, self._held(decodes))

    def _mixed_step(self, rate: float) -> tuple[float, float]:
        """(mean time of a step, decodes in it) of an instance that gets so many requests a second."""
        fresh = rate * self._mean_fresh
        step_ps = float(self._ability.decode_ps(1, self._load.mean_context))
        for _ in range(_MOST_ROUNDS):
            decodes = max(rate * self._tokens * step_ps / PS_PER_S, 1e-9)
            tokens = fresh * step_ps / PS_PER_S
            if decodes > self._ability.max_sequences or tokens > self._ability.token_budget:
                return inf, inf
            # The tokens of a prompt come in one step of several, not a few in each: a share of the steps is long.
            chunk = min(max(self._mean_fresh, 1.0), float(self._ability.token_budget))
            share = min(tokens / chunk, 1.0)
            plain = self._step_ps(0, decodes)
            following = plain + share * (self._step_ps(round(chunk), decodes) - plain)
            if tokens > chunk:
                following = self._step_ps(ceil(tokens), decodes)
            if abs(following - step_ps) < 1e-4 * step_ps:
                return following, decodes
            step_ps = (step_ps + following) / 2
        return inf, inf

    def _decode_step(self, rate: float) -> tuple[float, float]:
        step_ps = float(self._ability.decode_ps(1, self._load.mean_context))
        for _ in range(_MOST_ROUNDS):
            decodes = max(rate * self._tokens * step_ps / PS_PER_S, 1e-9)
            if decodes > self._ability.max_sequences:
                return inf, inf
            following = self._step_ps(0, decodes)
            if abs(following - step_ps) < 1e-4 * step_ps:
                return following, decodes
            step_ps = (step_ps + following) / 2
        return inf, inf

    def _step_ps(self, prompt_tokens: int, decodes: float) -> float:
        number = max(1, ceil(decodes))
        context = self._load.mean_context
        if not prompt_tokens:
            return float(self._ability.decode_ps(number, context))
        total = round(number * context)
        return float(self._ability.timer.step_ps((Prompt(prompt_tokens, 0, True),), number, total, ceil(context)))

    def _prompt_ps(self, tokens: int, decodes: float) -> float:
        """A whole prompt in chunks, beside so many decodes."""
        number, budget = round(decodes), self._ability.token_budget
        total = round(number * self._load.mean_context)
        sum_ps = 0
        for begin in range(0, tokens, budget):
            chunk = Prompt(min(budget, tokens - begin), begin, begin + budget >= tokens)
            sum_ps += self._ability.timer.step_ps((chunk,), number, total, ceil(self._load.mean_context))
        return float(sum_ps)

    def _mean_prompt_ps(self) -> float:
        return sum(self._prompt_ps(tokens, 0.0) for tokens in self._knots) / _KNOTS

    def _wait(self, services_ps: list[float], rate: float, instances: int) -> tuple[float, float]:
        """(seconds that a slow prompt waits, share of time that prompts take): M/G/n, Sakasegawa 1977."""
        mean_s = sum(services_ps) / len(services_ps) / PS_PER_S
        second = sum(service * service for service in services_ps) / len(services_ps) / PS_PER_S**2
        share = rate * mean_s
        if share >= 1:
            return inf, share
        variation = (self._load.cv_squared + second / mean_s**2 - 1) / 2
        waits = share ** (sqrt(2 * (instances + 1)) - 1)
        mean_wait_s = max(variation, 0.0) * mean_s / instances * waits / (1 - share)
        late = 1 - (self._limits.ttft[1] if self._limits.ttft[0] < inf else 90.0) / 100
        if waits <= late or mean_wait_s == 0:
            return 0.0, share
        return mean_wait_s / waits * log(waits / max(late, 1e-4)), share

    def _held(self, decodes: float) -> float:
        return decodes * self._load.mean_context / self._ability.kv_tokens

    def _judge(self, ttft_s: float, tpot_ps: float, share: float, kv_share: float) -> Prediction:
        ttft_ns, tpot_ns = ttft_s * NS_PER_S, tpot_ps / PS_PER_NS
        margins = {"KV memory": 1 - kv_share / _KV_SHARE}
        for bound in self._slo.bounds:
            tokens = self._load.at_percent(self._load.outputs, percent_of(bound, self._slo))
            figure = {"ttft": ttft_ns, "tpot": tpot_ns, "e2e": ttft_ns + tokens * tpot_ns}.get(bound.metric)
            if bound.limit_ns is not None and figure is not None:
                name = {"ttft": "prompt compute", "tpot": "decode speed"}.get(bound.metric, "speed")
                margins[name] = min(margins.get(name, 1.0), 1 - figure / bound.limit_ns)
        resource = min(margins, key=lambda name: margins[name])
        return Prediction(ttft_ns, tpot_ns, share, kv_share, margins[resource], resource)

    def _lost(self, resource: str = "prompt and decode compute") -> Prediction:
        return Prediction(inf, inf, 1.0, 1.0, -inf, resource)
