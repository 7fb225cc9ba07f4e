"""The bytes of one tier under a hard cap: whoever wants some takes a lease, and the sum never passes the cap.

Counts bytes; must not know where they are.
"""

from __future__ import annotations

import threading
from types import TracebackType

from megalith.base.errors import PoolFull
from megalith.base.units import format_bytes


class Lease:
    """Bytes taken from a pool until release(), or until the end of the context."""

    __slots__ = ("_pool", "num_bytes", "owner")

    def __init__(self, pool: Pool, owner: str, num_bytes: int) -> None:
        self.owner = owner
        self.num_bytes = num_bytes
        self._pool: Pool | None = pool

    def release(self) -> None:
        """Give the bytes back; again is no error."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._give(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Pool:
    """At most `cap_bytes` in `tier` (`device`, `host`, `disk` or `peer`). Threads may share it."""

    def __init__(self, tier: str, cap_bytes: int) -> None:
        self.tier = tier
        self.cap_bytes = cap_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._owners: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, owner: str, num_bytes: int) -> Lease:
        """A lease of `num_bytes`. Raises PoolFull, with nothing changed, where the cap does not allow it."""
        if num_bytes < 0:
            raise ValueError(f"{owner} cannot take {num_bytes} bytes")
        with self._lock:
            if self.used_bytes + num_bytes > self.cap_bytes:
                most = sorted(self._owners, key=self._owners.__getitem__, reverse=True)[:3]
                held = ", ".join([f"{name} {format_bytes(self._owners[name])}" for name in most]) or "nobody any"
                raise PoolFull(
                    f"{owner} asked for {format_bytes(num_bytes)} of the {self.tier} pool, which has "
                    f"{format_bytes(self.cap_bytes - self.used_bytes)} of {format_bytes(self.cap_bytes)} free "
                    f"({held}).",
                    "Release something first, or give the pool more bytes.",
                )
            self.used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            self._owners[owner] = self._owners.get(owner, 0) + num_bytes
        return Lease(self, owner, num_bytes)

    def owners(self) -> dict[str, int]:
        """Bytes by owner."""
        with self._lock:
            return dict(self._owners)

    def _give(self, lease: Lease) -> None:
        with self._lock:
            self.used_bytes -= lease.num_bytes
            left = self._owners[lease.owner] - lease.num_bytes
            if left:
                self._owners[lease.owner] = left
            else:
                del self._owners[lease.owner]
