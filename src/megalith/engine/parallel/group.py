"""Ranks 1 and up as worker processes: started together, wired to each other where the collective is a ring."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import msgspec

from megalith.base.errors import MachineError, StepFailed
from megalith.engine.frames import HELLO, WireError
from megalith.engine.parallel import wire
from megalith.engine.parallel.collectives import PeerLost
from megalith.engine.parallel.ports import Port, PortChannel
from megalith.engine.parallel.wire import RankReport, RankSetup
from megalith.engine.worker_process import WorkerGroup, WorkerProcess

_LOAD_DEADLINE_S = 1800.0
"""Reading, decoding and, with a window, writing a share of a large model."""


class RankLink(WorkerProcess):
    """One rank. It is told what to do at once and loads while others are started."""

    channel: PortChannel

    def __init__(self, setup: RankSetup, port: Port | None, neighbours: Sequence[int]) -> None:
        super().__init__(
            f"Rank {setup.rank} of {setup.ranks}", "megalith.engine.parallel.worker", PortChannel, setup.threads,
            remedy="Use --tensor-parallel 1.", more_fds=neighbours,
        )  # fmt: skip
        self.setup = setup
        self.report: RankReport | None = None
        self.channel.port = port
        self.channel.deadline_s = _LOAD_DEADLINE_S
        try:
            self.channel.send(HELLO, msgspec.json.encode(setup))
        except WireError as error:
            self.close()
            raise MachineError(f"{self.name} did not start: {error}") from None

    def hello(self) -> None:
        """Wait until it has loaded. Raises MachineError."""
        ready = self.await_ready(self.setup.deadline_s)
        self.report = msgspec.json.decode(bytes(ready.payload), type=RankReport)

    def stats(self) -> RankReport:
        """What it has now. Between steps only."""
        self.send(wire.STATS)
        return msgspec.json.decode(bytes(self.receive(wire.STATS).payload), type=RankReport)


def start_ranks(setups: Sequence[RankSetup], port: Port | None) -> list[RankLink]:
    """Processes for these ranks, 1 and up. Raises MachineError, leaving no process behind."""
    links: list[RankLink] = []
    ring = bool(setups) and setups[0].collective == "ring"
    pairs = [socket.socketpair() for _ in setups[1:]] if ring else []  # between rank i + 1 and rank i + 2
    try:
        for i, setup in enumerate(setups):
            left = pairs[i - 1][1].fileno() if ring and i > 0 else -1
            right = pairs[i][0].fileno() if ring and i < len(pairs) else -1
            links.append(RankLink(setup, port, (left, right)))
    except MachineError:
        for link in links:
            link.close()
        raise
    finally:
        for pair in pairs:
            for sock in pair:
                sock.close()
    return links


def named(group: WorkerGroup[RankLink], lost: PeerLost) -> StepFailed:
    """Which process the failure began in: in a ring the neighbours of a dead one fail as well."""
    ended = [link for link in group.links if (link.process.poll() or 0) < 0]
    link = ended[0] if ended else group.links[lost.rank - 1]
    return link.failed(lost)
