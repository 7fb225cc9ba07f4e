"""The links to attention workers: what is said over them beside what every worker process understands.

Knows frames and block tables; knows neither attention nor placement, and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from megalith.base.errors import MachineError
from megalith.engine import attention_wire as wire
from megalith.engine.attention_wire import Channel, Run, Tables, WorkerSetup
from megalith.engine.worker_process import WorkerGroup, WorkerProcess


class WorkerLink(WorkerProcess):
    """One worker process and the tables that it knows. Raises MachineError when it does not start."""

    def __init__(self, name: str, setup: WorkerSetup, threads: int = 1) -> None:
        super().__init__(name, "megalith.engine.attention_worker", Channel, threads, remedy="Use --attention here.")
        self.setup = setup
        self._tables = Tables()

    def hello(self) -> None:
        """Tell it what it serves and wait until it is ready. Raises MachineError."""
        self.greet(msgspec.json.encode(self.setup), self.setup.deadline_s)

    def step(self, runs: list[Run]) -> None:
        """Where the rows of this step belong."""
        self.send(wire.STEP, self._tables.encode(runs), count=len(runs))

    def stats(self) -> dict[str, int]:
        """Bytes that it `read` and `written` of its KV, and has `held`."""
        self.send(wire.STATS)
        return msgspec.json.decode(bytes(self.receive(wire.STATS).payload), type=dict[str, int])


def start_workers(names: Iterable[str], setups: Iterable[WorkerSetup], threads: int) -> WorkerGroup[WorkerLink]:
    """A ready group. Raises MachineError, leaving no process behind."""
    links: list[WorkerLink] = []
    try:
        for name, setup in zip(names, setups, strict=True):
            links.append(WorkerLink(name, setup, threads))
    except MachineError:
        for link in links:
            link.close()
        raise
    return WorkerGroup(links)
