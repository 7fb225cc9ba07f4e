"""All-reduce between ranks that each have one port: a star through rank 0, or a ring. The alpha-beta model.

    star   2 a + 2 (n - 1) S / B        two hops; the port of rank 0 takes every addend and sends every sum
    ring   2 (n - 1) (a + S / (n B))    2 (n - 1) hops of a chunk each

with n ranks, S bytes, latency a and rate B of a port each way. The star is faster beyond the latency

    a* = (n - 1)^2 S / (n (n - 2) B)

and never for two ranks, where both have two hops and the ring sends half. After TPI-LLM (arXiv:2410.00531), which found
that latency decides on slow networks; the ring's terms are those of Thakur et al. (2005). `cost.compute` and
`cost.roofline` take a ring for devices with collectives of their own; this is for processes over sockets.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S

Collective: TypeAlias = Literal["star", "ring"]


class Link(Config):
    """What every rank's port does. `bytes_per_s` None: no bound."""

    latency_ns: int = 0
    bytes_per_s: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.latency_ns < 0 or (self.bytes_per_s is not None and self.bytes_per_s < 1):
            raise ConfigError(f"A link of {self.latency_ns} ns and {self.bytes_per_s} bytes/s cannot be.")

    def ns(self, num_bytes: float) -> float:
        """Through a port, without latency."""
        return 0.0 if self.bytes_per_s is None else num_bytes * NS_PER_S / self.bytes_per_s


def all_reduce_ns(collective: Collective, num_bytes: float, ranks: int, link: Link, hop_ns: float = 0.0) -> float:
    """Of `num_bytes` over so many ranks; `hop_ns` is what this machine needs for a hop whatever the link does."""
    if ranks == 1:
        return 0.0
    latency = link.latency_ns + hop_ns
    if collective == "star":
        return 2 * latency + 2 * (ranks - 1) * link.ns(num_bytes)
    return 2 * (ranks - 1) * (latency + link.ns(num_bytes / ranks))


def crossover_ns(num_bytes: float, ranks: int, link: Link) -> float | None:
    """The latency beyond which the star is faster; None: it never is."""
    if ranks <= 2:
        return None
    return (ranks - 1) ** 2 / (ranks * (ranks - 2)) * link.ns(num_bytes)


def step_link_ns(
    collective: Collective, hidden: int, layers: int, rows: int, ranks: int, link: Link, hop_ns: float = 0.0
) -> float:
    """Of a step of `rows` rows in float32: hidden states to every rank once, then two all-reduces a layer."""
    if ranks == 1:
        return 0.0
    num_bytes = 4 * rows * hidden
    begin = link.latency_ns + hop_ns + (ranks - 1) * link.ns(num_bytes)
    return begin + 2 * layers * all_reduce_ns(collective, num_bytes, ranks, link, hop_ns)
