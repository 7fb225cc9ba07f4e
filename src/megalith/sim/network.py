"""The network between instances: transfers that share ports max-min fairly, in integer arithmetic.

Knows instances by number, bytes and time; knows nothing of requests or KV. Every instance has an egress and an ingress
port on each link; a transfer holds one of either while its bytes are on the wire and arrives one latency later.
Bandwidth is shared by progressive filling (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2): all rates rise
together until a port is full, those through it stay, the others rise on. Rates are whole millionths of a byte a second
and work is counted in 10**-15 byte, so that nothing drifts and the order of events is the same on every machine; a
rate is rounded down by less than that, and the end of a transfer up to a whole nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heapreplace
from typing import Literal

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import InstanceId
from megalith.sim.kernel import Kernel
from megalith.specs.fleet import LinkSpec

RATE_UNITS = 1_000_000
"""Rate units in one byte a second."""
WORK_UNITS = RATE_UNITS * NS_PER_S
"""Work units in one byte: what one rate unit does in a nanosecond is one work unit."""

_OUT, _IN = 0, 1


class Transfer:
    """Bytes on their way from one instance to another. Only the network changes it."""

    __slots__ = (
        "_left",
        "_line",
        "_ports",
        "_rate",
        "_since_ns",
        "_stamp",
        "done",
        "ended_ns",
        "num_bytes",
        "sent_ns",
        "source",
        "state",
        "target",
    )

    def __init__(self, source: InstanceId, target: InstanceId, num_bytes: int, sent_ns: int) -> None:
        self.source = source
        self.target = target
        self.num_bytes = num_bytes
        self.sent_ns = sent_ns
        self.ended_ns: int | None = None
        """When it arrived or was cancelled."""
        self.state: Literal["moving", "landing", "arrived", "cancelled"] = "moving"
        """moving: bytes are on the wire. landing: all have left, the latency is running."""
        self.done: Callable[[Transfer], None]
        self._left = num_bytes * WORK_UNITS
        self._rate = 0
        self._since_ns = sent_ns
        self._stamp = 0
        self._line: _Line
        self._ports: tuple[_Port, _Port]

    @property
    def live(self) -> bool:
        """It may still arrive."""
        return self.state in ("moving", "landing")


class _Port:
    """One end of a link at one instance, in one direction."""

    __slots__ = ("moving", "order", "work")

    def __init__(self, order: int) -> None:
        self.order = order
        self.moving: dict[Transfer, int] = {}
        """Transfers through it, in the order in which they started, with the most that each may have."""
        self.work = 0


class _Line:
    """A link: the rate of one port, how many an instance has, and the latency."""

    __slots__ = ("capacity", "latency_ns", "rate")

    def __init__(self, bytes_per_s: float, ports: int, latency_s: float) -> None:
        self.rate = round(bytes_per_s * RATE_UNITS)
        self.capacity = self.rate * ports
        self.latency_ns = round(latency_s * NS_PER_S)
        if self.rate < RATE_UNITS or ports < 1 or self.latency_ns < 0:
            raise ConfigError(
                f"A link of {bytes_per_s} bytes a second, {ports} ports and {latency_s} s latency cannot be.",
                "Use at least 1 byte a second, at least 1 port and a latency of at least 0.",
            )


class Network:
    """Transfers in flight. A change costs O(n log n) in the transfers that share ports with it, directly or in turn."""

    def __init__(self, kernel: Kernel, link: LinkSpec, pool_of: Callable[[InstanceId], str] | None = None) -> None:
        """`pool_of` names the pool of an instance; it is needed only when `link` has pairs."""
        if link.pairs and pool_of is None:
            raise ValueError("links between pools need to know the pools")
        self._kernel = kernel
        self._contention = link.contention
        self._common = _Line(link.bytes_per_s, link.ports, link.latency_s)
        self._pairs = {
            (pair.source, pair.target): _Line(pair.bytes_per_s, pair.ports, pair.latency_s) for pair in link.pairs
        }
        self._pool_of = pool_of
        self._ports: dict[tuple[_Line, InstanceId, int], _Port] = {}
        self.moving = 0
        """Transfers that have not arrived and were not cancelled."""
        self.arrived = 0
        self.cancelled = 0
        self.delivered_bytes = 0
        """Bytes of transfers that arrived."""

    # Sending

    def send(
        self,
        source: InstanceId,
        target: InstanceId,
        num_bytes: int,
        done: Callable[[Transfer], None],
        most_bytes_per_s: int | None = None,
    ) -> Transfer:
        """Send bytes; `done(transfer)` is called once, when the last one arrives, unless it is cancelled before.

        `most_bytes_per_s`: the sender has no more to give, as with KV that is still being computed.
        """
        if source == target or num_bytes < 0 or (most_bytes_per_s is not None and most_bytes_per_s < 1):
            raise ValueError(f"cannot send {num_bytes} bytes from {source} to {target} at most {most_bytes_per_s} B/s")
        line = self._line(source, target)
        transfer = Transfer(source, target, num_bytes, self._kernel.now_ns)
        transfer.done = done
        transfer._line = line
        ports = (self._port(line, source, _OUT), self._port(line, target, _IN))
        transfer._ports = ports
        most = line.rate if most_bytes_per_s is None else min(line.rate, most_bytes_per_s * RATE_UNITS)
        self.moving += 1
        if num_bytes == 0:
            self._land(transfer)
        elif self._contention:
            alone = not ports[0].moving and not ports[1].moving
            for port in ports:
                port.moving[transfer] = most
            if alone:
                self._set_rate(transfer, most)
            else:
                self._share(ports)
        else:
            self._set_rate(transfer, most)
        return transfer

    def cancel(self, transfer: Transfer) -> int:
        """Stop a transfer; `done` is not called. Returns the bytes of it that had left; they count in the ports.

        Nothing happens when it has ended already.
        """
        if transfer.live:
            if transfer.state == "moving":
                self._settle(transfer)
                self._release(transfer)
            transfer.state = "cancelled"
            transfer.ended_ns = self._kernel.now_ns
            self.moving -= 1
            self.cancelled += 1
        return transfer.num_bytes - -(-transfer._left // WORK_UNITS)

    # Reading

    def moved_bytes(self, transfer: Transfer) -> int:
        """Whole bytes of a transfer that have left by now."""
        left = transfer._left
        if transfer.state == "moving":
            left = max(0, left - transfer._rate * (self._kernel.now_ns - transfer._since_ns))
        return transfer.num_bytes - -(-left // WORK_UNITS)

    def bytes_per_s(self, transfer: Transfer) -> float:
        """The rate of a transfer now; 0 once its bytes have left."""
        return transfer._rate / RATE_UNITS if transfer.state == "moving" else 0.0

    def latency_ns(self, source: InstanceId, target: InstanceId) -> int:
        """From one instance to another."""
        return self._line(source, target).latency_ns

    def next_bytes_per_s(self, source: InstanceId, target: InstanceId) -> float:
        """What one more transfer would get of the ports by now, if all in them share alike."""
        line = self._line(source, target)
        if not self._contention:
            return line.rate / RATE_UNITS
        ends = ((line, source, _OUT), (line, target, _IN))
        others = max([len(self._ports[end].moving) if end in self._ports else 0 for end in ends])
        return min(line.rate, line.capacity // (1 + others)) / RATE_UNITS

    def sent_bytes(self, instance: InstanceId) -> int:
        """Whole bytes that have left the egress ports of an instance, as of the last change of each transfer."""
        return self._counted(instance, _OUT)

    def received_bytes(self, instance: InstanceId) -> int:
        """Whole bytes that have come in through the ingress ports of an instance, likewise."""
        return self._counted(instance, _IN)

    # Inside

    def _line(self, source: InstanceId, target: InstanceId) -> _Line:
        if not self._pairs or self._pool_of is None:
            return self._common
        return self._pairs.get((self._pool_of(source), self._pool_of(target)), self._common)

    def _port(self, line: _Line, instance: InstanceId, direction: int) -> _Port:
        key = (line, instance, direction)
        port = self._ports.get(key)
        if port is None:
            port = self._ports[key] = _Port(len(self._ports))
        return port

    def _counted(self, instance: InstanceId, direction: int) -> int:
        ports = (self._ports.get((line, instance, direction)) for line in (self._common, *self._pairs.values()))
        return sum(port.work for port in ports if port is not None) // WORK_UNITS

    def _settle(self, transfer: Transfer) -> None:
        """Count what has moved since the rate was last set."""
        now_ns = self._kernel.now_ns
        moved = min(transfer._left, transfer._rate * (now_ns - transfer._since_ns))
        transfer._left -= moved
        transfer._since_ns = now_ns
        for port in transfer._ports:
            port.work += moved

    def _set_rate(self, transfer: Transfer, rate: int) -> None:
        """The transfer is settled; from now on it has this rate."""
        transfer._rate = rate
        transfer._stamp += 1
        end_ns = transfer._since_ns + -(-transfer._left // rate)
        self._kernel.at(end_ns, self._left_source, (transfer, transfer._stamp))

    def _left_source(self, event: tuple[Transfer, int]) -> None:
        transfer, stamp = event
        if stamp == transfer._stamp and transfer.state == "moving":
            self._settle(transfer)
            self._release(transfer)
            self._land(transfer)

    def _release(self, transfer: Transfer) -> None:
        if self._contention:
            out, into = transfer._ports
            del out.moving[transfer], into.moving[transfer]
            if out.moving or into.moving:
                self._share(transfer._ports)

    def _land(self, transfer: Transfer) -> None:
        transfer.state = "landing"
        if transfer._line.latency_ns:
            self._kernel.at(self._kernel.now_ns + transfer._line.latency_ns, self._arrive, transfer)
        elif transfer.num_bytes:
            self._arrive(transfer)
        else:
            self._kernel.at(self._kernel.now_ns, self._arrive, transfer)  # never from inside send()

    def _arrive(self, transfer: Transfer) -> None:
        if transfer.state != "landing":
            return
        transfer.state = "arrived"
        transfer.ended_ns = self._kernel.now_ns
        self.moving -= 1
        self.arrived += 1
        self.delivered_bytes += transfer.num_bytes
        transfer.done(transfer)

    def _share(self, changed: tuple[_Port, _Port]) -> None:
        """Give every transfer that shares ports with the changed ones, directly or in turn, its rate."""
        moving, ports = _reach(changed)
        for transfer, rate in _fill(moving, ports):
            if rate != transfer._rate:
                self._settle(transfer)
                self._set_rate(transfer, rate)


def _reach(changed: Iterable[_Port]) -> tuple[dict[Transfer, int], list[_Port]]:
    """All transfers (with their own limits) and ports that a change can touch."""
    ports = {port: None for port in changed if port.moving}
    todo = list(ports)
    moving: dict[Transfer, int] = {}
    for port in todo:
        for transfer, most in port.moving.items():
            if transfer not in moving:
                moving[transfer] = most
                for other in transfer._ports:
                    if other not in ports:
                        ports[other] = None
                        todo.append(other)
    return moving, todo


def _fill(moving: dict[Transfer, int], ports: list[_Port]) -> list[tuple[Transfer, int]]:
    """Progressive filling. O((transfers + ports) log). The share of a port never falls while it is under way."""
    capacity = next(iter(moving))._line.capacity
    if len(moving) == 1:
        return list(moving.items())
    left = dict.fromkeys(ports, capacity)
    count = {port: len(port.moving) for port in ports}
    heap = [(capacity // count[port], port.order, port) for port in ports]
    heapify(heap)
    limited = sorted([(most, index, transfer) for index, (transfer, most) in enumerate(moving.items())])
    rates: dict[Transfer, int] = {}
    next_limited = 0
    while len(rates) < len(moving):
        share, order, port = heap[0]
        if not count[port]:
            heappop(heap)
            continue
        if left[port] // count[port] != share:
            heapreplace(heap, (left[port] // count[port], order, port))
            continue
        while limited[next_limited][2] in rates:
            next_limited += 1
        most, _, transfer = limited[next_limited]
        if most <= share:
            fixed = [(transfer, most)]
        else:
            fixed = [(other, share) for other in port.moving if other not in rates]
        for other, rate in fixed:
            rates[other] = rate
            for end in other._ports:
                left[end] -= rate
                count[end] -= 1
    return list(rates.items())
