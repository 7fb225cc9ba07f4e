"""Ranks as threads of one process over real socket pairs: collectives without the seconds that torch takes to start."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from megalith.cost.collective import Collective, Link
from megalith.engine.parallel.collectives import Ranks
from megalith.engine.parallel.ports import Port, PortChannel

T = TypeVar("T")


def wired(size: int, collective: Collective, link: Link | None = None, deadline_s: float = 20.0) -> list[Ranks]:
    """Ranks with a channel between every two."""
    ports = [None if link is None else Port(link) for _ in range(size)]
    channels: list[dict[int, PortChannel]] = [{} for _ in range(size)]
    for low in range(size):
        for high in range(low + 1, size):
            a, b = socket.socketpair()
            channels[low][high] = PortChannel(a, deadline_s, ports[low])
            channels[high][low] = PortChannel(b, deadline_s, ports[high])
    return [Ranks(rank, size, collective, channels[rank]) for rank in range(size)]


def together(ranks: list[Ranks], work: Callable[[Ranks], T]) -> list[T]:
    """What `work` gives on each rank, all at once."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


def close(ranks: list[Ranks]) -> None:
    for rank in ranks:
        rank.close()
        for channel in rank.channels.values():
            channel.sock.close()
