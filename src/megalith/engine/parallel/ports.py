"""A network imposed on the links of ranks: every rank has one port, with a rate each way and a latency.

All ranks are processes of one machine and read one clock. A sender stamps a frame with when its first byte would be at
the other side; the receiver holds the frame back until its own port would have taken the last byte. So nobody is slowed
who does not wait, and what two ranks send to a third at once shares its port.
"""

from __future__ import annotations

import socket
import struct
import time

from megalith.base.units import NS_PER_S
from megalith.cost.collective import Link
from megalith.engine.frames import Buffer, Frame, FrameChannel
from megalith.engine.parallel.wire import DATA
from megalith.tier.throttle import TokenBucket

_STAMP = struct.Struct("<q")
_UNBOUNDED = 1 << 60


class Port:
    """One rank's way to the others."""

    def __init__(self, link: Link) -> None:
        self._rate = link.bytes_per_s or _UNBOUNDED
        self._out = TokenBucket(self._rate, 0, link.latency_ns)
        self._in = TokenBucket(self._rate)

    def departs(self, now_ns: int, num_bytes: int) -> int:
        """When the first byte of what is sent now is at the other side."""
        return self._out.ready_ns(now_ns, num_bytes) - num_bytes * NS_PER_S // self._rate

    def arrives(self, first_ns: int, num_bytes: int) -> int:
        """When the last byte of what begins to arrive at `first_ns` is in."""
        return self._in.ready_ns(first_ns, num_bytes)


class PortChannel(FrameChannel):
    """A channel of this protocol behind a port, or without one."""

    DATA = DATA

    def __init__(self, sock: socket.socket, deadline_s: float, port: Port | None = None) -> None:
        super().__init__(sock, deadline_s)
        self.port = port

    def send(self, kind: int, *parts: Buffer, layer: int = 0, count: int = 0) -> None:
        """See FrameChannel."""
        if self.port is not None and kind in DATA:
            num_bytes = sum(part.nbytes if hasattr(part, "nbytes") else len(part) for part in parts)
            parts = (_STAMP.pack(self.port.departs(time.monotonic_ns(), num_bytes)), *parts)
        super().send(kind, *parts, layer=layer, count=count)

    def receive(self, *, idle: bool = False) -> Frame:
        """See FrameChannel; returns when the port lets it."""
        frame = super().receive(idle=idle)
        if self.port is None or frame.kind not in DATA:
            return frame
        (first_ns,) = _STAMP.unpack_from(frame.payload)
        over_ns = self.port.arrives(first_ns, len(frame.payload) - _STAMP.size)
        while (left_ns := over_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / NS_PER_S)
        return frame._replace(payload=frame.payload[_STAMP.size :])
