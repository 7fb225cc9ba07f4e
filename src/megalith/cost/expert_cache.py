"""How often a model is resident: popularity of experts, and Che's approximation of an LRU cache of them.

Che, Tung and Wang (IEEE JSAC 2002): an LRU cache of C equal models behaves as if each stayed for one characteristic
time T after its last use, where the expected number of models used within T is C. Requests are independent draws here.
Knows shares; must not know bytes or seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, expm1

from megalith.base.errors import ConfigError


def popularity(models: int, zipf: float = 0.0) -> tuple[float, ...]:
    """The share of requests of each model: proportional to rank**-zipf; 0 is uniform. They add up to 1."""
    if models < 1 or not 0.0 <= zipf <= 10.0:
        raise ConfigError(
            f"{models} models with a Zipf exponent of {zipf:g} cannot be.", "Give 1 or more, and 0 to 10."
        )
    weights = [rank**-zipf for rank in range(1, models + 1)]
    total = sum(weights)
    return tuple([weight / total for weight in weights])


def characteristic_time(shares: Sequence[float], slots: int) -> float:
    """T, in requests, with sum(1 - exp(-share * T)) == slots. There must be fewer slots than models with a share."""
    low, high = 0.0, 1.0
    while _used(shares, high) < slots:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2.0
        if _used(shares, middle) < slots:
            low = middle
        else:
            high = middle
    return high


def lru_hit_rate(shares: Sequence[float], slots: int) -> float:
    """The share of requests that find their model resident, with room for `slots` models; by Che's approximation."""
    wanted = [share for share in shares if share > 0.0]
    if slots >= len(wanted):
        return 1.0
    if slots < 1:
        return 0.0
    time = characteristic_time(wanted, slots)
    return sum([share * -expm1(-share * time) for share in wanted])


def distinct(shares: Sequence[float], draws: int) -> float:
    """Expected number of different models among so many independent requests."""
    return sum([1.0 - (1.0 - share) ** draws for share in shares])


def _used(shares: Sequence[float], time: float) -> float:
    return sum([1.0 - exp(-share * time) for share in shares])
