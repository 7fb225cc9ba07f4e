"""Cluster designs of prompt and token machines: which mix is the cheapest, the least-power or the fastest.

After Splitwise (Patel et al., ISCA 2024, section IV-D). A mix is measured once, at the size that a power budget allows;
its rate, cost and power then grow together with its size, which holds while there are many machines of each kind (the
published optima are broad valleys). Knows prices, powers and rates; must not know how a rate is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from typing import Literal, NamedTuple, TypeAlias

from megalith.base.errors import CapacityError, ConfigError

Objective: TypeAlias = Literal["rate", "cost", "power"]


class Machine(NamedTuple):
    """A kind of machine."""

    device: str
    cost: float
    """Of one for an hour, in any unit that all share."""
    power: float
    """Of one, in any unit that all share."""
    power_cap: float | None = None


class Mix(NamedTuple):
    """Machines of a cluster; without token machines, all do both."""

    design: str
    prompt: Machine
    prompts: int
    token: Machine | None = None
    tokens: int = 0

    @property
    def cost(self) -> float:
        """An hour."""
        return self.prompts * self.prompt.cost + (self.tokens * self.token.cost if self.token else 0.0)

    @property
    def power(self) -> float:
        """Of all machines."""
        return self.prompts * self.prompt.power + (self.tokens * self.token.power if self.token else 0.0)

    @property
    def sizes(self) -> str:
        """In a few words."""
        return f"({self.prompts}, {self.tokens})" if self.token else f"{self.prompts}"


class Rated(NamedTuple):
    """A mix and the rate that it serves within its service level."""

    mix: Mix
    rate: float


class Sized(NamedTuple):
    """A mix at the size that was asked for."""

    mix: Mix
    times: float
    """So many times the size that was measured."""
    rate: float
    cost: float
    power: float


def mix_of(design: str, prompt: Machine, token: Machine | None, power: float, share: float = 1.0) -> Mix:
    """The mix that a power budget allows with that share of it for prompt machines. Raises ConfigError."""
    if token is None:
        return Mix(design, prompt, _at_least_one(int(power / prompt.power), design, power))
    prompts = _at_least_one(round(share * power / prompt.power), design, power)
    tokens = int((power - prompts * prompt.power) / token.power + 1e-9)
    return Mix(design, prompt, prompts, token, _at_least_one(tokens, design, power))


def choose(
    rated: Iterable[Rated], objective: Objective, *, rate: float = 0.0, cost: float = inf, power: float = inf
) -> Sized:
    """The best mix that serves at least `rate` for at most `cost` and `power`, at its best size.

    Raises CapacityError when there is none, ConfigError where the objective has no end.
    """
    if objective == "rate" and cost == power == inf:
        raise ConfigError("The fastest cluster has no size.", "Give it a cost or a power to keep to.")
    if objective != "rate" and rate <= 0:
        raise ConfigError("The smallest cluster of no load is none.", "Give a rate to serve.")
    sized: list[Sized] = []
    for one in rated:
        if one.rate <= 0:
            continue
        most = min(cost / one.mix.cost, power / one.mix.power)
        times = most if objective == "rate" else rate / one.rate
        if times == inf:  # a rate so small that no number of machines adds up to what is asked
            continue
        # A hair of slack: a size that just fits is worked out by dividing.
        if times <= most * (1 + 1e-9) and times * one.rate >= rate * (1 - 1e-9):
            sized.append(Sized(one.mix, times, times * one.rate, times * one.mix.cost, times * one.mix.power))
    if not sized:
        raise CapacityError(
            f"No mix serves {rate:g} requests a second for a cost of {cost:g} and a power of {power:g}.",
            "Raise the budgets, or ask for less.",
        )
    return min(sized, key=lambda one: -one.rate if objective == "rate" else getattr(one, objective))


def valley(rated: Sequence[Rated], design: str, within: float = 0.95) -> list[Mix]:
    """The mixes of a design that come within a share of its best: how broad its optimum is."""
    own = [one for one in rated if one.mix.design == design]
    best = max((one.rate for one in own), default=0.0)
    return [one.mix for one in own if one.rate >= within * best > 0]


def _at_least_one(count: int, design: str, power: float) -> int:
    if count < 1:
        raise ConfigError(f"A power of {power:g} has no room for both kinds of machines of {design}.", "Raise it.")
    return count
