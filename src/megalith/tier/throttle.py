"""A token bucket: when a transfer may be over on a link of a given rate, burst and latency.

It imposes a slower disk or PCIe link than the machine has, so that a real run can be held against the simulator's.
Pure and exact: integer arithmetic, the clock is an argument (the virtual scheduling form of the generic cell rate
algorithm, ITU-T I.371).
"""

from __future__ import annotations

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S


class TokenBucket:
    """A link of `bytes_per_s` that lets `burst_bytes` through at once after a rest; every transfer also takes
    `latency_ns`, which does not occupy the link.

    Over any interval, transfers that began and were over in it carry at most rate * interval + burst bytes.
    """

    def __init__(self, bytes_per_s: int, burst_bytes: int = 0, latency_ns: int = 0) -> None:
        if bytes_per_s <= 0 or burst_bytes < 0 or latency_ns < 0:
            raise ConfigError(
                f"A link of {bytes_per_s} bytes/s with a burst of {burst_bytes} bytes and a latency of {latency_ns} ns "
                "cannot be.",
                "Give it at least 1 byte/s, and 0 or more of the others.",
            )
        self.bytes_per_s = bytes_per_s
        self.burst_bytes = burst_bytes
        self.latency_ns = latency_ns
        self._full_at = 0
        """When the bucket is full again if nothing more comes, in ns * bytes_per_s: no division, so no rounding."""

    def ready_ns(self, now_ns: int, num_bytes: int) -> int:
        """When a transfer of `num_bytes` that is asked for at `now_ns` may be over, on the same clock. Takes them."""
        if num_bytes < 0:
            raise ValueError(f"a transfer of {num_bytes} bytes cannot be")
        self._full_at = max(self._full_at, now_ns * self.bytes_per_s) + num_bytes * NS_PER_S
        owed = self._full_at - self.burst_bytes * NS_PER_S
        return max(now_ns, -(-owed // self.bytes_per_s)) + self.latency_ns
